package contenthashtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Tree is a tree of files. The first entry is the root, parents stand before
// what is in them.
type Tree struct {
	Entries []Entry
}

// Entry is one file.
type Entry struct {
	// Path is relative and slash separated; that of the root is empty.
	Path string
	// Type is one of f d l p s c b, as ls shows them, or h for a further name
	// of the regular file Link.
	Type byte
	// Mode are the permissions with setuid, setgid and sticky bit.
	Mode     uint32
	UID, GID int
	// Data is the content of a regular file, Hole the number of bytes without
	// data after it.
	Data string
	Hole int64
	Link string
	// Xattrs are name, value, name, value...
	Xattrs []string
}

var names = []string{
	"a", "b", "c", "foo", "foo.txt", "foo-bar", "foo bar", "x.go", "y.go", "A", "-", "é", "..a", "...", " ",
	".wh.foo", ".wh..wh..opq", "\xff", "\xffz", "ÿ", "\x80\x81", `a\b`, "*", "[x]", "a\nb", "\x01", "~", "ab", "a.b",
}

var modes = []uint32{0o644, 0o644, 0o755, 0o600, 0o777, 0o4755, 0o2755, 0o1777, 0o6711, 0o000, 0o444}

// capability is the value of security.capability for cap_net_raw=ep.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// New makes the tree of a seed.
func New(seed uint64) Tree {
	g := &generator{r: rand.New(rand.NewPCG(seed, 1)), taken: map[string]bool{}}
	g.entry(Entry{Type: 'd', Mode: 0o755})
	for range 3 + g.r.IntN(22) {
		g.grow()
	}
	return Tree{g.entries}
}

type generator struct {
	r       *rand.Rand
	entries []Entry
	taken   map[string]bool
	dirs    []string
	files   []string
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func (g *generator) chance(percent int) bool { return g.r.IntN(100) < percent }

func (g *generator) grow() {
	p := path.Join(pick(g.r, g.dirs), pick(g.r, names))
	if g.taken[p] {
		return
	}
	e := Entry{Path: p, Mode: pick(g.r, modes)}
	switch n := g.r.IntN(100); {
	case n < 30:
		e.Type, e.Mode = 'd', pick(g.r, []uint32{0o755, 0o755, 0o700, 0o1777, 0o2775, 0o311})
	case n < 65:
		e.Type = 'f'
		e.Data = pick(g.r, []string{"", "data0", "data1", "a longer line of text\n", "\x00"})
		if g.chance(10) {
			e.Hole = int64(g.r.IntN(200_000))
		}
	case n < 85:
		e.Type, e.Mode, e.Link = 'l', 0o777, g.target()
	case n < 90 && len(g.files) > 0:
		e = Entry{Path: p, Type: 'h', Link: pick(g.r, g.files)}
	default:
		e.Type = pick(g.r, []byte("pscb"))
	}
	g.entry(e)
}

// entry adds e, with an owner and attributes.
func (g *generator) entry(e Entry) {
	if e.Type != 'h' {
		if g.chance(30) {
			e.UID, e.GID = g.r.IntN(3), pick(g.r, []int{0, 1, 1000, 65534})
		}
		if g.chance(25) {
			e.Xattrs = g.xattrs(e.Type)
		}
	}
	g.taken[e.Path] = true
	g.entries = append(g.entries, e)
	switch e.Type {
	case 'd':
		g.dirs = append(g.dirs, e.Path)
	case 'f':
		g.files = append(g.files, e.Path)
	}
}

func (g *generator) xattrs(typ byte) []string {
	out := []string{}
	if g.chance(50) {
		out = append(out, "trusted.t", "1")
	}
	if g.chance(20) {
		out = append(out, "security.other", "label")
	}
	if typ != 'f' && typ != 'd' {
		return out
	}
	out = append(out, "user.b", pick(g.r, []string{"", "v", "\x00\xff"}))
	if g.chance(40) {
		out = append(out, "user.a", "w")
	}
	if typ == 'f' && g.chance(40) {
		out = append(out, "security.capability", capability)
	}
	return out
}

// target makes the target of a link: to what is there, to nothing, out of the
// tree, in circles.
func (g *generator) target() string {
	some := func() string { return pick(g.r, g.entries).Path }
	switch g.r.IntN(12) {
	case 0:
		return pick(g.r, []string{"..", ".", "/", "../..", "./", "/..", "../../../../.."})
	case 1, 2:
		return pick(g.r, names)
	case 3:
		return "../" + pick(g.r, names)
	case 4:
		return "missing/../" + pick(g.r, names)
	case 5:
		return "/" + some() + "/../" + pick(g.r, names)
	case 6:
		return "../../../" + some() + "/"
	case 7:
		return "./" + pick(g.r, names) + "//" + pick(g.r, names)
	default:
		return "/" + some()
	}
}

// Write makes the files in an empty directory. It needs root.
func (t Tree) Write(dir string) error {
	for _, e := range t.Entries {
		if err := e.write(dir); err != nil {
			return fmt.Errorf("make %q: %w", e.Path, err)
		}
	}
	return nil
}

func (e Entry) write(dir string) error {
	p := filepath.Join(dir, e.Path)
	switch e.Type {
	case 'd':
		if e.Path != "" {
			if err := os.Mkdir(p, 0o700); err != nil {
				return err
			}
		}
	case 'f':
		if err := os.WriteFile(p, []byte(e.Data), 0o600); err != nil {
			return err
		}
		if e.Hole > 0 {
			if err := os.Truncate(p, int64(len(e.Data))+e.Hole); err != nil {
				return err
			}
		}
	case 'l':
		if err := os.Symlink(e.Link, p); err != nil {
			return err
		}
	case 'h':
		return os.Link(filepath.Join(dir, e.Link), p)
	default:
		kind := map[byte]uint32{'p': unix.S_IFIFO, 's': unix.S_IFSOCK, 'c': unix.S_IFCHR, 'b': unix.S_IFBLK}[e.Type]
		if err := unix.Mknod(p, kind|0o600, 0); err != nil {
			return err
		}
	}
	return e.attributes(p)
}

func (e Entry) attributes(p string) error {
	if err := os.Lchown(p, e.UID, e.GID); err != nil {
		return err
	}
	if e.Type != 'l' {
		if err := unix.Chmod(p, e.Mode); err != nil {
			return err
		}
	}
	for i := 0; i < len(e.Xattrs); i += 2 {
		if err := unix.Lsetxattr(p, e.Xattrs[i], []byte(e.Xattrs[i+1]), 0); err != nil {
			return fmt.Errorf("%s: %w", e.Xattrs[i], err)
		}
	}
	return nil
}
