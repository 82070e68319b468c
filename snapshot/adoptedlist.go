package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"iter"
	"os"
	"sort"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
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
