package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// world is a subject with records in it, on which operations are measured.
type world struct {
	opener  Opener
	dir     string
	subject Subject
	// base is held: the parent of what operations make.
	base Immutable
	// ids are the finalized records that fill the state, indexed by
	// indexKey of their place.
	ids []string
	// tips are those of them that have no children.
	tips []string
	// depths are records at the end of longer chains, by their length.
	depths map[int]string
	// trees are finalized records with many files, by their number, held.
	trees map[int]Immutable
	// inputs are records to be merged, child one of base's, held.
	inputs []Immutable
	child  Immutable
	// legacy are states of an old daemon, by the number of their records.
	legacy map[int]*legacyState
	// turn picks another record for each sample.
	turn int
}

// chain is the length of the chains that the state consists of, and fileSize
// the one file in each snapshot: layers of an image, so to say.
const (
	chain    = 10
	fileSize = 4096
)

func indexKey(i int) string { return fmt.Sprintf("bench/%08d", i) }

// newWorld opens a cache in a new directory below dir and fills it with n
// finalized records.
func newWorld(ctx context.Context, o Opener, dir string, n int) (_ *world, err error) {
	w := &world{
		opener: o,
		dir:    filepath.Join(dir, fmt.Sprintf("%s-%d", o.Name, n)),
		depths: map[int]string{},
		trees:  map[int]Immutable{},
	}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		return nil, err
	}
	final := w.dir
	if o.Portable {
		// Thousands of synced transactions on a disk would take minutes.
		memory, merr := os.MkdirTemp(memoryDir(), "lamina-bench-")
		if merr != nil {
			return nil, merr
		}
		defer func() { err = errors.Join(err, removeAll(memory)) }()
		w.dir = memory
	}
	// Before what it lies in is removed.
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s with %d records: %w", o.Name, n, err), w.close(context.WithoutCancel(ctx)))
		}
	}()
	if w.subject, err = o.Open(ctx, w.dir); err != nil {
		return nil, err
	}
	if w.base, err = w.add(ctx, nil); err != nil {
		return nil, err
	}
	if err := w.fill(ctx, n); err != nil {
		return nil, err
	}
	if w.dir != final {
		if err := w.move(ctx, final); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// memoryDir is a directory in memory if there is one, or else the system's for
// temporary files.
func memoryDir() string {
	const shm = "/dev/shm"
	if unix.Access(shm, unix.W_OK) == nil {
		return shm
	}
	return os.TempDir()
}

// move closes the cache, copies it to dir, with all attributes and hard links,
// and opens it there.
func (w *world) move(ctx context.Context, dir string) error {
	open, err := w.reopen(ctx)
	if err != nil {
		return err
	}
	if err := command(ctx, "cp", "-a", "--", w.dir+"/.", dir); err != nil {
		return fmt.Errorf("copy the state: %w", err)
	}
	w.dir = dir
	if err := open(ctx); err != nil {
		return err
	}
	return w.hold(ctx)
}

// fill makes chains of finalized records, n in all with the base.
func (w *world) fill(ctx context.Context, n int) error {
	w.ids = append(w.ids, w.base.ID())
	for len(w.ids) < n {
		var parent Immutable
		for range min(chain, n-len(w.ids)) {
			next, err := w.add(ctx, parent)
			if parent != nil {
				err = errors.Join(err, parent.Release(ctx))
			}
			if err != nil {
				return err
			}
			parent = next
			w.ids = append(w.ids, next.ID())
		}
		w.tips = append(w.tips, parent.ID())
		if err := parent.Release(ctx); err != nil {
			return err
		}
	}
	return nil
}

// deep is a record at the end of a chain of n, made when first asked for.
func (w *world) deep(ctx context.Context, n int) (id string, err error) {
	if id, ok := w.depths[n]; ok {
		return id, nil
	}
	var parent Immutable
	for range n {
		next, err := w.finalized(ctx, parent, nil, "file")
		if parent != nil {
			err = errors.Join(err, parent.Release(ctx))
		}
		if err != nil {
			return "", err
		}
		parent = next
	}
	w.depths[n] = parent.ID()
	return parent.ID(), parent.Release(ctx)
}

// add makes the next of the state's records, with an indexed value.
func (w *world) add(ctx context.Context, parent Immutable) (Immutable, error) {
	i := len(w.ids)
	values := []Value{{Name: "bench", Data: fmt.Sprint(i), Index: indexKey(i)}}
	return w.finalized(ctx, parent, values, fmt.Sprintf("file-%d", i))
}

// finalized makes one finalized record with a file.
func (w *world) finalized(ctx context.Context, parent Immutable, values []Value, file string) (Immutable, error) {
	mut, err := w.subject.New(ctx, parent, values...)
	if err != nil {
		return nil, err
	}
	if err := writeFile(ctx, mut, file, make([]byte, fileSize)); err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	if err := imm.Finalize(ctx); err != nil {
		return nil, errors.Join(err, imm.Release(ctx))
	}
	return imm, nil
}

// writeFile writes one file into a snapshot.
func writeFile(ctx context.Context, mut Mutable, name string, data []byte) error {
	return mut.Change(ctx, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, name), data, 0o600)
	})
}

// next picks the place of another record for each call, in an order that is
// the same for every subject.
func (w *world) next() int {
	w.turn++
	// 7919 is a prime: its multiples visit every place of any state that is
	// not a multiple of it.
	return w.turn * 7919 % len(w.ids)
}

// reopen closes the cache; the function that it returns opens it.
func (w *world) reopen(ctx context.Context) (open func(context.Context) error, err error) {
	if err := w.base.Release(ctx); err != nil {
		return nil, err
	}
	w.base = nil
	if err := w.subject.Close(); err != nil {
		return nil, err
	}
	w.subject = nil
	return func(ctx context.Context) (err error) {
		w.subject, err = w.opener.Open(ctx, w.dir)
		return err
	}, nil
}

// hold takes the base again after a reopen.
func (w *world) hold(ctx context.Context) (err error) {
	w.base, err = w.subject.Get(ctx, w.ids[0])
	return err
}

func (w *world) close(ctx context.Context) error {
	var err error
	for _, imm := range w.trees {
		err = errors.Join(err, imm.Release(ctx))
	}
	for _, imm := range w.inputs {
		err = errors.Join(err, imm.Release(ctx))
	}
	if w.child != nil {
		err = errors.Join(err, w.child.Release(ctx))
	}
	if w.base != nil {
		err = errors.Join(err, w.base.Release(ctx))
	}
	if w.subject != nil {
		err = errors.Join(err, w.subject.Close())
	}
	return err
}
