package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// adoptedList is the file that names the adopted snapshots.
const adoptedList = "adopted"

// The mark that a line of the list begins with. It is one byte in a place of
// its own, so that it changes by one write.
const (
	markWaits = '+'
	markTaken = '-'
)

// none stands for an empty field: no escaped text looks like it.
const none = "."

// adoption is a line of the list: an adopted snapshot, and what its entry is
// going to say.
type adoption struct {
	// name is that of the entry; key is set if that is a digest of the key.
	name, key string
	// dir is the name of the data directory.
	dir              string
	active           bool
	parent           string
	created, updated int64
	inodes, size     int64
	bound            string
	// at is where the line begins in the list.
	at int64
}

func (a adoption) entry() entry {
	if a.active {
		return entry{dirActive, a.name}
	}
	return entry{dirCommitted, a.name}
}

// fullKey is the key of the snapshot; ok is false if nothing says it.
func (a adoption) fullKey() (key string, ok bool) {
	if a.key != "" {
		return a.key, true
	}
	return decodeKey(a.name)
}

// state is what info is going to say.
func (a adoption) state() state {
	s := state{
		Key: text(a.key), Parent: text(a.parent), Created: a.created, Updated: a.updated,
		Sealed: !a.active, Bound: text(a.bound),
	}
	if s.Sealed {
		s.Usage = &usage{Inodes: a.inodes, Size: a.size}
	}
	return s
}

func (a adoption) kind() snapshots.Kind {
	if a.active {
		return snapshots.KindActive
	}
	return snapshots.KindCommitted
}

// append adds the line to a list: fields with a blank between them, text
// escaped as in the names of entries, and a CRC-32C of all but the mark.
func (a adoption) append(list []byte) []byte {
	kind := "c"
	if a.active {
		kind = "a"
	}
	field := func(s string) string {
		if s == "" {
			return none
		}
		return escapeKey(s)
	}
	list = append(list, markWaits, ' ')
	begin := len(list)
	for _, s := range [...]string{a.name, field(a.key), field(a.dir), kind, field(a.parent), field(a.bound)} {
		list = append(append(list, s...), ' ')
	}
	for _, n := range [...]int64{a.created, a.updated, a.inodes, a.size} {
		list = append(strconv.AppendInt(list, n, 10), ' ')
	}
	sum := crc32.Checksum(list[begin:], castagnoli)
	return fmt.Appendf(list, "%08x\n", sum)
}

// lineFields is how many fields a line has, with its mark and its sum.
const lineFields = 12

// validLine says whether a line, without its end, is as it was written.
func validLine(line []byte) bool {
	const sum = 8
	if len(line) < 2+sum || line[1] != ' ' || line[0] != markWaits && line[0] != markTaken {
		return false
	}
	want, err := strconv.ParseUint(string(line[len(line)-sum:]), 16, 32)
	return err == nil && crc32.Checksum(line[2:len(line)-sum], castagnoli) == uint32(want)
}

// parseAdoption reads a valid line.
func parseAdoption(line []byte) (a adoption, err error) {
	f := bytes.Split(line, []byte(" "))
	if len(f) != lineFields {
		return a, fmt.Errorf("a line has %d fields: %w", len(f), errdefs.ErrDataLoss)
	}
	a.name, a.active = string(f[1]), string(f[4]) == "a"
	for i, to := range map[int]*string{2: &a.key, 3: &a.dir, 5: &a.parent, 6: &a.bound} {
		if string(f[i]) != none {
			*to = unescapeKey(string(f[i]))
		}
	}
	for i, to := range []*int64{&a.created, &a.updated, &a.inodes, &a.size} {
		if *to, err = strconv.ParseInt(string(f[7+i]), 10, 64); err != nil {
			return a, err
		}
	}
	return a, nil
}

// adoptions is the list of adopted snapshots that have no entry yet.
//
// A line counts as long as it is marked as waiting and its data is there. To
// take it is to make the entry, complete and by one rename as any other, and
// then to mark the line; what has an entry is never looked for in the list, so
// that a kill between the two changes nothing, and an entry is not renamed
// before its line is marked. A power cut may lose marks: Settle finds them out.
type adoptions struct {
	path string

	// mu guards what follows, and is held while an entry is made.
	mu   sync.Mutex
	read bool
	list []byte
	// lines are where the valid lines begin, in the order of their names.
	lines []int
	// children counts, by parent, the lines that wait; nil until asked for.
	children map[string]int
}

// load reads the list, once.
func (l *adoptions) load() error {
	if l.read {
		return nil
	}
	list, err := os.ReadFile(l.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l.set(list)
	return nil
}

// set takes a list. Lines that are damaged cost what they name.
func (l *adoptions) set(list []byte) {
	l.read, l.list, l.lines, l.children = true, list, nil, nil
	for at := 0; at < len(list); {
		n := bytes.IndexByte(list[at:], '\n')
		if n < 0 {
			break
		}
		if validLine(list[at : at+n]) {
			l.lines = append(l.lines, at)
		}
		at += n + 1
	}
}

func (l *adoptions) line(at int) []byte {
	line := l.list[at:]
	return line[:bytes.IndexByte(line, '\n')]
}

// find is the line of an entry's name, if it waits.
func (l *adoptions) find(name string) (adoption, bool, error) { return l.search(name, markWaits) }

// taken is the line of an entry's name, if it no longer waits.
func (l *adoptions) taken(name string) (adoption, bool, error) { return l.search(name, markTaken) }

func (l *adoptions) search(name string, mark byte) (a adoption, ok bool, err error) {
	if err := l.load(); err != nil {
		return a, false, err
	}
	i, found := sort.Find(len(l.lines), func(i int) int {
		field := l.list[l.lines[i]+2:]
		return bytes.Compare([]byte(name), field[:bytes.IndexByte(field, ' ')])
	})
	if !found || l.list[l.lines[i]] != mark {
		return a, false, nil
	}
	return l.at(i)
}

func (l *adoptions) at(i int) (a adoption, ok bool, err error) {
	if a, err = parseAdoption(l.line(l.lines[i])); err != nil {
		return a, false, fmt.Errorf("%q: %w", l.path, err)
	}
	a.at = int64(l.lines[i])
	return a, true, nil
}

// waiting yields the lines that wait.
func (l *adoptions) waiting() iter.Seq2[adoption, error] {
	return func(yield func(adoption, error) bool) {
		if err := l.load(); err != nil {
			yield(adoption{}, err)
			return
		}
		for i, at := range l.lines {
			if l.list[at] != markWaits {
				continue
			}
			if a, _, err := l.at(i); !yield(a, err) {
				return
			}
		}
	}
}

// childrenOf counts the lines that wait and have key as their parent.
func (l *adoptions) childrenOf(key string) (int, error) {
	if l.children == nil {
		children := map[string]int{}
		for a, err := range l.waiting() {
			if err != nil {
				return 0, err
			}
			children[a.parent]++
		}
		l.children = children
	}
	return l.children[key], nil
}

// mark notes that lines no longer count.
func (l *adoptions) mark(taken ...adoption) error { return l.write(markTaken, -1, taken) }

// wait notes that a line counts again.
func (l *adoptions) wait(a adoption) error { return l.write(markWaits, 1, []adoption{a}) }

// write changes the marks of lines, and with them the counts of their parents.
func (l *adoptions) write(mark byte, children int, lines []adoption) error {
	if len(lines) == 0 {
		return nil
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	for _, a := range lines {
		if _, err := f.WriteAt([]byte{mark}, a.at); err != nil {
			return errors.Join(err, f.Close())
		}
		l.list[a.at] = mark
		if l.children != nil {
			l.children[a.parent] += children
		}
	}
	return f.Close()
}

// awaited is the adopted snapshot of a name that has no entry yet.
func (t *tree) awaited(name string) (adoption, bool, error) {
	t.adoptions.mu.Lock()
	defer t.adoptions.mu.Unlock()
	return t.adoptions.find(name)
}

// allAwaited are the adopted snapshots of a directory without an entry there.
// names are the entries, in order.
func (t *tree) allAwaited(dir string, names []string) (list []adoption, err error) {
	t.adoptions.mu.Lock()
	defer t.adoptions.mu.Unlock()
	for a, err := range t.adoptions.waiting() {
		if err != nil {
			return nil, err
		}
		if _, there := slices.BinarySearch(names, a.name); !there && a.entry().dir == dir {
			list = append(list, a)
		}
	}
	return list, nil
}

// awaitedChildren counts the children of a key that have no entry yet.
func (t *tree) awaitedChildren(key string) (int, error) {
	t.adoptions.mu.Lock()
	defer t.adoptions.mu.Unlock()
	return t.adoptions.childrenOf(key)
}

// claim makes the entry of an adopted snapshot that has none, and first those
// of its ancestors; it does nothing for other names. Callers look again
// afterwards: someone else may have made it meanwhile.
func (t *tree) claim(name string) error {
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	var chain []adoption
	for name != "" {
		a, ok, err := l.find(name)
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if chain = append(chain, a); a.parent == "" || len(chain) > len(l.lines) {
			break
		}
		name = encodeKey(a.parent)
	}
	for _, a := range slices.Backward(chain) {
		if err := t.take(a); err != nil {
			return fmt.Errorf("adopted snapshot %s: %w", a.dir, err)
		}
	}
	return nil
}

// take makes the entry of an adopted snapshot whose parent has one, unless a
// kill came between the entry and its mark.
func (t *tree) take(a adoption) error {
	there, err := exists(t.at(a.entry()))
	if err == nil && !there {
		err = t.makeAdopted(a)
	}
	if err != nil {
		return err
	}
	if err := t.step("adopt.mark"); err != nil {
		return err
	}
	return t.adoptions.mark(a)
}

func (t *tree) makeAdopted(a adoption) (err error) {
	making := entry{dirNew, randomName(a.name)}
	t.mark(&t.making, making.name, true)
	defer t.mark(&t.making, making.name, false)
	defer func() {
		if err != nil {
			err = errors.Join(err, t.unmake(making))
		}
	}()
	if err := t.step("adopt.mkdir"); err != nil {
		return err
	}
	path := t.at(making)
	if err := t.linkData(path, a.dir, a.active); err != nil {
		return err
	}
	s := a.state()
	if a.parent != "" {
		if err := t.join(a.parent, path, 0); err != nil {
			return err
		}
	}
	if err := t.backend.examine(filepath.Join(path, "fs"), &s); err != nil {
		return err
	}
	if err := t.bind(&s); err != nil {
		return err
	}
	if err := t.step("adopt.info"); err != nil {
		return err
	}
	if err := createState(filepath.Join(path, "info"), s); err != nil {
		return err
	}
	return t.rename("adopt.rename", making, a.entry())
}

// detachAwaited removes an adopted snapshot that has no entry: its data itself
// moves to trash, which needs no room on the disk. ok is false if there is no
// such snapshot, or if it has to get its entry first.
func (t *tree) detachAwaited(key string) (trash entry, ok bool, err error) {
	name := encodeKey(key)
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok, err := l.find(name)
	if err != nil || !ok || a.key != "" {
		return entry{}, false, err
	}
	if there, err := exists(t.at(a.entry())); err != nil || there {
		return entry{}, false, err
	}
	if n, err := l.childrenOf(key); err != nil {
		return entry{}, false, err
	} else if n > 0 {
		return entry{}, false, fmt.Errorf("cannot remove %q, which is the parent of %d: %w", key, n, errdefs.ErrFailedPrecondition)
	}
	trash = entry{dirTrash, movedName(a)}
	if err := t.step("remove.move"); err != nil {
		return entry{}, false, err
	}
	// Before the name is there, so that a Cleanup that runs does not see it.
	t.mark(&t.held, trash.name, true)
	err = unix.Renameat2(unix.AT_FDCWD, t.path(dirAdopted, a.dir), unix.AT_FDCWD, t.at(trash), unix.RENAME_NOREPLACE)
	if err != nil {
		t.mark(&t.held, trash.name, false)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EBUSY) {
			return entry{}, false, nil
		}
		return entry{}, false, fmt.Errorf("move %s/%s to trash: %w", dirAdopted, a.dir, err)
	}
	if err := l.mark(a); err != nil {
		t.mark(&t.held, trash.name, false)
		return entry{}, false, errors.Join(err, os.Rename(t.at(trash), t.path(dirAdopted, a.dir)))
	}
	return trash, true, nil
}

// restoreMoved takes such a removal back: the line waits again before the data
// is there, which a kill between the two leaves to Settle.
func (t *tree) restoreMoved(e, from entry, dir string) error {
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok, err := l.taken(from.name)
	if err != nil {
		return err
	}
	if !ok || a.dir != dir || a.entry() != from {
		return fmt.Errorf("nothing says what %s/%s was: %w", e.dir, e.name, errdefs.ErrNotFound)
	}
	for _, d := range []string{dirActive, dirCommitted} {
		if there, err := exists(t.path(d, from.name)); err != nil {
			return err
		} else if there {
			return fmt.Errorf("snapshot %s: %w", from.name, errdefs.ErrAlreadyExists)
		}
	}
	if a.parent != "" {
		_, waits, err := l.find(encodeKey(a.parent))
		there := waits
		if err == nil && !waits {
			there, err = exists(t.path(dirCommitted, encodeKey(a.parent)))
		}
		if err != nil {
			return err
		}
		if !there {
			return fmt.Errorf("its parent %q is gone: %w", a.parent, errdefs.ErrFailedPrecondition)
		}
	}
	if err := l.wait(a); err != nil {
		return err
	}
	err = t.step("restore.move")
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, t.at(e), unix.AT_FDCWD, t.path(dirAdopted, dir), unix.RENAME_NOREPLACE)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("move %s back from trash: %w", dir, asNotFound(err)), l.mark(a))
	}
	return nil
}

// discardMoved deletes the data of a removal that had no entry. The first
// rename is the moment from which it cannot be had back.
func (t *tree) discardMoved(e entry, going string) error {
	if err := t.step("discard.going"); err != nil {
		return err
	}
	if going != e.name {
		err := os.Rename(t.at(e), t.path(dirTrash, going))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := t.step("discard.bytes"); err != nil {
		return err
	}
	return removeTree(t.path(dirTrash, going))
}

// left notes that a name is about to be no longer where an adopted snapshot
// would be looked for, should a kill have come before its mark.
func (t *tree) left(e entry) error {
	if e.dir != dirActive && e.dir != dirCommitted {
		return nil
	}
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok, err := l.find(e.name)
	if err != nil || !ok {
		return err
	}
	return l.mark(a)
}

// settleAdopted takes back the marks that a power cut lost: what has an entry,
// even in trash, or no data any more, does not wait. It reads the links of all
// entries, as long as some snapshot waits.
func (t *tree) settleAdopted(context.Context) error {
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.load(); err != nil || len(l.lines) == 0 {
		return err
	}
	owned, err := t.ownedData()
	if err != nil {
		return err
	}
	dirs, err := t.list(dirAdopted)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	here := make(map[string]bool, len(dirs))
	for _, dir := range dirs {
		here[dir] = true
	}
	var taken []adoption
	waits := false
	for a, err := range l.waiting() {
		if err != nil {
			return err
		}
		if owned[a.dir] || !here[a.dir] {
			taken = append(taken, a)
		} else {
			waits = true
		}
	}
	if waits {
		return l.mark(taken...)
	}
	if err := t.step("adopt.done"); err != nil {
		return err
	}
	l.set(nil)
	return os.Remove(l.path)
}

// ownedData are the data directories that entries lead to.
func (t *tree) ownedData() (map[string]bool, error) {
	owned := map[string]bool{}
	for _, dir := range []string{dirActive, dirCommitted, dirTrash} {
		names, err := t.list(dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if dir == dirTrash && moved(name) {
				continue
			}
			for _, elem := range []string{"fs", "gone"} {
				data, err := t.adopted(t.path(dir, name, elem))
				if err != nil && !errdefs.IsDataLoss(err) {
					return nil, err
				}
				if err == nil && data != "" {
					owned[filepath.Base(data)] = true
				}
			}
		}
	}
	return owned, nil
}
