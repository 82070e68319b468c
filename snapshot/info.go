package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// compactAt is the size of an info log, in bytes, from which it is rewritten
// with its last state alone. A line is some 150 bytes plus labels, so this
// happens after hundreds of updates, and reading stays one short read.
const compactAt = 64 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// state is all that is known of an entry beside its name and its directory:
// one line of an info log.
type state struct {
	// Key is the key of an entry whose directory name is a digest.
	Key text `json:"key,omitempty"`
	// View is set for a read-only snapshot in active.
	View bool `json:"view,omitempty"`
	// Parent is the name of the parent, empty for none.
	Parent text `json:"parent,omitempty"`
	// Layers are set for a stack: the names of its layers, bottom first.
	Layers []text `json:"layers,omitempty"`
	// Hidden is how many of the layers, from the bottom, an opaque root hides.
	Hidden int `json:"hidden,omitempty"`
	// Clean says that the layer may lie over any other, see Stacker.
	Clean bool `json:"clean,omitempty"`
	// Opaque says that the layer's root hides all that is below it. The
	// kernel knows no such root, so the layers below are left out.
	Opaque bool `json:"opaque,omitempty"`
	// Bound says why the layer makes sense over its own parent only. What
	// lies over such a layer is mounted with the same options, which leave
	// the same marks, and so is bound, too.
	Bound text `json:"bound,omitempty"`
	// Labels are sorted by name.
	Labels []label `json:"labels,omitempty"`
	// Created and Updated are nanoseconds since 1970.
	Created int64 `json:"created"`
	Updated int64 `json:"updated"`
	// Usage is set in sealed lines, but not in those of exact layers.
	Usage *usage `json:"usage,omitempty"`
	// Sealed lines count for committed entries, the others for active ones.
	Sealed bool `json:"sealed,omitempty"`
}

// needs are the names that the entry has links to.
func (s state) needs() []string {
	if s.Parent != "" {
		return []string{string(s.Parent)}
	}
	names := make([]string, len(s.Layers))
	for i, name := range s.Layers {
		names[i] = string(name)
	}
	return names
}

// stack says whether the entry is a list of layers rather than one.
func (s state) stack() bool { return len(s.Layers) > 0 }

type label [2]text

type usage struct {
	Inodes int64 `json:"inodes"`
	Size   int64 `json:"size"`
}

// text is a string of any bytes: JSON's strings cannot hold them, so what is
// not UTF-8 is written as an array with its bytes in base 64.
type text string

func (t text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal([1][]byte{[]byte(t)})
}

func (t *text) UnmarshalJSON(b []byte) error {
	if !bytes.HasPrefix(b, []byte("[")) {
		return json.Unmarshal(b, (*string)(t))
	}
	var raw [1][]byte
	if err := json.Unmarshal(b, &raw); err != nil {
		return err
	}
	*t = text(raw[0])
	return nil
}

func (s state) labels() map[string]string {
	if len(s.Labels) == 0 {
		return nil
	}
	m := make(map[string]string, len(s.Labels))
	for _, l := range s.Labels {
		m[string(l[0])] = string(l[1])
	}
	return m
}

// setLabels replaces all labels. One with an empty value is no label, as in
// containerd's own store.
func (s *state) setLabels(m map[string]string) {
	s.Labels = nil
	for k, v := range m {
		if v != "" {
			s.Labels = append(s.Labels, label{text(k), text(v)})
		}
	}
	slices.SortFunc(s.Labels, func(a, b label) int { return bytes.Compare([]byte(a[0]), []byte(b[0])) })
}

// info is what callers see of the entry.
func (s state) info(key string, kind snapshots.Kind) snapshots.Info {
	return snapshots.Info{
		Kind: kind, Name: key, Parent: string(s.Parent), Labels: s.labels(),
		Created: time.Unix(0, s.Created).UTC(), Updated: time.Unix(0, s.Updated).UTC(),
	}
}

// line is the state as a line of the log.
func (s state) line() ([]byte, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(body, castagnoli), body), nil
}

func parseLine(line []byte) (s state, ok bool) {
	sum, body, found := bytes.Cut(line, []byte(" "))
	if !found || len(sum) != 8 {
		return state{}, false
	}
	want, err := strconv.ParseUint(string(sum), 16, 32)
	if err != nil || crc32.Checksum(body, castagnoli) != uint32(want) {
		return state{}, false
	}
	return s, json.Unmarshal(body, &s) == nil
}

// parseLog returns the last valid line that counts: of an active entry the last
// one that is not sealed, of a committed one the sealed line. If a power cut
// took that, while the rename that followed it is on the disk, the last line
// of the active entry stands in: it says the same but for times, labels and
// usage that the commit gave.
func parseLog(log []byte, committed bool) (s state, ok bool) {
	var last state
	for len(log) > 0 {
		var line []byte
		log = bytes.TrimSuffix(log, []byte("\n"))
		i := bytes.LastIndexByte(log, '\n')
		log, line = log[:i+1], log[i+1:]
		switch s, valid := parseLine(line); {
		case valid && s.Sealed == committed:
			return s, true
		case valid && committed && !ok:
			last, ok = s, true
		}
	}
	return last, ok
}

// readState reads an info log. A log without a line that counts is
// errdefs.ErrDataLoss: entries get their first line before their name, so
// only a power cut or a hand can bring it about.
func readState(path string, committed bool) (state, error) {
	log, err := readFile(path)
	if err != nil {
		return state{}, err
	}
	s, ok := parseLog(log, committed)
	if !ok {
		return state{}, fmt.Errorf("no valid line in %q: %w", path, errdefs.ErrDataLoss)
	}
	return s, nil
}

// createState writes the first line of an info log.
func createState(path string, s state) error {
	line, err := s.line()
	if err != nil {
		return err
	}
	return writeFile(path, os.O_EXCL, line)
}

// appendState adds a line in one write. When that fails the log is as before.
func appendState(path string, s state) (err error) {
	line, err := s.line()
	if err != nil {
		return err
	}
	f, err := openFile(path, os.O_RDWR|os.O_APPEND)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() >= compactAt {
		return compactState(f, path, s, line)
	}
	if torn, err := endsTorn(f, fi.Size()); err != nil {
		return err
	} else if torn {
		line = append([]byte("\n"), line...)
	}
	if _, err := f.Write(line); err != nil {
		return errors.Join(err, f.Truncate(fi.Size()))
	}
	return nil
}

// endsTorn says whether the last line was cut off, so that the next one
// would become a part of it.
func endsTorn(f *os.File, size int64) (bool, error) {
	if size == 0 {
		return false, nil
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], size-1); err != nil {
		return false, err
	}
	return last[0] != '\n', nil
}

// compactState replaces the log by one that ends with the same states: the
// new one, and before it the last that counts while this one does not.
func compactState(f *os.File, path string, s state, line []byte) error {
	log, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	var out []byte
	if other, ok := parseLog(log, !s.Sealed); ok && s.Sealed {
		if out, err = other.line(); err != nil {
			return err
		}
	}
	next := path + ".new"
	err = writeFile(next, os.O_TRUNC, append(out, line...))
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(next))
	}
	return err
}

// openFile opens a regular file. os.OpenFile would offer it to the poller first,
// which takes four system calls and never wants it.
func openFile(path string, flag int) (*os.File, error) {
	fd, err := fsat.OpenAt(unix.AT_FDCWD, path, flag, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func writeFile(path string, flag int, data []byte) error {
	f, err := openFile(path, os.O_WRONLY|os.O_CREATE|flag)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// readFile is os.ReadFile in four system calls of ten, for it is called several
// times in all that is done with a snapshot.
func readFile(path string) ([]byte, error) {
	fd, err := fsat.OpenAt(unix.AT_FDCWD, path, unix.O_RDONLY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer fsat.Close(fd)
	data := make([]byte, 0, 512)
	for {
		n, err := fsat.Pread(fd, data[len(data):cap(data)], int64(len(data)))
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return data, nil
		}
		if data = data[:len(data)+n]; len(data) == cap(data) {
			data = slices.Grow(data, len(data))
		}
	}
}
