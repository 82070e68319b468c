package snapshot

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A union is a directory as a mount of its layers would show it, read without
// a mount: that needs no privilege, leaves nothing behind, and shows which
// layer something is from. A plain tree is a union of one directory without
// marks.
type union struct {
	marks marks
	parts []part // topmost first; none at all is an empty directory
	// roots, if not nil, says which directories the first lookup has to open.
	roots func() ([]string, error)
}

// part is one of the directories that a union consists of.
type part struct {
	*os.File
	shut func() error
	id   inodeID
	// xwhite says that empty files with an attribute are whiteouts in it.
	xwhite bool
}

func (p part) close() error { return errors.Join(p.Close(), p.shut()) }

// found is a name that a union shows.
type found struct {
	name string
	at   int // which part it is in, for directories the topmost one
	st   unix.Stat_t
}

func (f *found) isDir() bool     { return f.st.Mode&unix.S_IFMT == unix.S_IFDIR }
func (f *found) isRegular() bool { return f.st.Mode&unix.S_IFMT == unix.S_IFREG }

// openUnion opens the roots of layers, topmost first. They may be symbolic
// links.
func openUnion(m marks, roots []string) (u *union, err error) {
	u = &union{marks: m}
	if err := u.open(roots); err != nil {
		return nil, errors.Join(err, u.close())
	}
	return u, nil
}

func (u *union) open(roots []string) error {
	for _, root := range roots {
		place, err := openPlace(unix.AT_FDCWD, root, unix.O_DIRECTORY)
		if err != nil {
			return asNotFound(err)
		}
		if _, err := u.add(place); err != nil {
			return err
		}
	}
	return nil
}

// add puts the directory of a place, which is closed, below the others.
// covers says that it hides what would come below it.
func (u *union) add(place *os.File) (covers bool, err error) {
	defer place.Close()
	st, err := stat(place)
	if err != nil {
		return false, err
	}
	if reason, err := u.marks.boundMark(place, &st); err != nil {
		return false, err
	} else if reason != "" {
		return false, &LayerError{Reason: reason, Bound: true}
	}
	opaque, _, err := u.marks.get(place, "opaque")
	if err != nil {
		return false, err
	}
	f, shut, err := openReadable(place, unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	u.parts = append(u.parts, part{f, shut, inodeID{st.Dev, st.Ino}, opaque == "x"})
	return opaque == "y", nil
}

func (u *union) close() error {
	var errs []error
	for _, p := range u.parts {
		errs = append(errs, p.close())
	}
	u.parts = nil
	return errors.Join(errs...)
}

// same says whether two directories consist of the very same ones.
func (u *union) same(v *union) bool {
	return u.marks == v.marks && slices.EqualFunc(u.parts, v.parts, func(p, q part) bool { return p.id == q.id })
}

// whiteout says whether an entry of a part hides what is below.
func (u *union) whiteout(p part, f *found) (bool, error) {
	if u.marks.whiteout(&f.st) {
		return true, nil
	}
	if !p.xwhite || !f.isRegular() || f.st.Size != 0 {
		return false, nil
	}
	place, err := openPlace(int(p.Fd()), f.name, unix.O_NOFOLLOW)
	if err != nil {
		return false, err
	}
	defer place.Close()
	_, ok, err := u.marks.get(place, "whiteout")
	return ok, err
}

// list is what the directory shows, sorted by name.
func (u *union) list() ([]found, error) {
	var out []found
	seen := map[string]bool{}
	for i, p := range u.parts {
		names, err := readNames(p.File)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if seen[name] {
				continue
			}
			seen[name] = true
			f, ok, err := u.in(i, name)
			if err != nil {
				return nil, err
			}
			if ok && f.name != "" {
				out = append(out, f)
			}
		}
	}
	slices.SortFunc(out, func(a, b found) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// in is the entry of one part; ok is false where there is none. For a whiteout
// the name in the result is empty.
func (u *union) in(i int, name string) (f found, ok bool, err error) {
	f = found{name: name, at: i}
	err = unix.Fstatat(int(u.parts[i].Fd()), name, &f.st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return found{}, false, nil
	}
	if err != nil {
		return found{}, false, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	white, err := u.whiteout(u.parts[i], &f)
	if white {
		f.name = ""
	}
	return f, err == nil, err
}

// lookup is what the directory shows under name.
func (u *union) lookup(name string) (f found, ok bool, err error) {
	if u.roots != nil {
		roots, err := u.roots()
		if err == nil {
			err = u.open(roots)
		}
		if err != nil {
			return found{}, false, err
		}
		u.roots = nil
	}
	for i := range u.parts {
		f, ok, err := u.in(i, name)
		if err != nil || ok {
			return f, ok && f.name != "", err
		}
	}
	return found{}, false, nil
}

// place opens what was found, as a mere place.
func (u *union) place(f *found) (*os.File, error) {
	return openPlace(int(u.parts[f.at].Fd()), f.name, unix.O_NOFOLLOW)
}

// sub is a directory that was found.
func (u *union) sub(f *found) (_ *union, err error) {
	sub := &union{marks: u.marks}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%q: %w", f.name, err), sub.close())
		}
	}()
	for i := f.at; i < len(u.parts); i++ {
		if i > f.at {
			below, ok, err := u.in(i, f.name)
			if err != nil {
				return nil, err
			}
			if !ok {
				continue
			}
			if below.name == "" || !below.isDir() {
				break
			}
		}
		place, err := openPlace(int(u.parts[i].Fd()), f.name, unix.O_NOFOLLOW|unix.O_DIRECTORY)
		if err != nil {
			return nil, err
		}
		if covers, err := sub.add(place); err != nil {
			return nil, err
		} else if covers {
			break
		}
	}
	return sub, nil
}

// top is the directory whose attributes the union shows, nil if it is empty.
func (u *union) top() *os.File {
	if len(u.parts) == 0 {
		return nil
	}
	return u.parts[0].File
}

// readNames lists an open directory from its beginning.
func readNames(dir *os.File) ([]string, error) {
	if _, err := dir.Seek(0, 0); err != nil {
		return nil, err
	}
	return dir.Readdirnames(-1)
}
