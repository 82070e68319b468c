package bench_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/hack/internal/bench"
)

// slowed opens a subject that lives in memory and whose New of an unindexed
// record takes at least pause.
func slowed(name string, pause time.Duration) bench.Opener {
	return bench.Opener{
		Name: name,
		Open: func(_ context.Context, dir string) (bench.Subject, error) {
			db, err := bolt.Open(filepath.Join(dir, "db"), 0o600, nil)
			if err != nil {
				return nil, err
			}
			return &fake{pause: pause, index: map[string]string{}}, db.Close()
		},
		Databases: func(dir string) []string { return []string{filepath.Join(dir, "db")} },
	}
}

type fake struct {
	pause time.Duration

	mu    sync.Mutex
	last  int
	index map[string]string
}

func (f *fake) New(_ context.Context, _ bench.Immutable, values ...bench.Value) (bench.Mutable, error) {
	if len(values) == 0 {
		for start := time.Now(); time.Since(start) < f.pause; {
			continue
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last++
	id := strconv.Itoa(f.last)
	for _, v := range values {
		f.index[v.Index] = id
	}
	return fakeRef(id), nil
}

func (f *fake) Get(_ context.Context, id string) (bench.Immutable, error) { return fakeImm(id), nil }

func (f *fake) Look(_ context.Context, id string) (bench.Immutable, error) { return fakeImm(id), nil }

func (f *fake) GetMutable(_ context.Context, id string) (bench.Mutable, error) {
	return fakeRef(id), nil
}

func (f *fake) Search(_ context.Context, key string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if id, ok := f.index[key]; ok {
		return []string{id}, nil
	}
	return nil, os.ErrNotExist
}

func (f *fake) NewVictim(ctx context.Context, parent bench.Immutable) (bench.Mutable, error) {
	return f.New(ctx, parent)
}

func (f *fake) Prune(context.Context, string, *int64) (int, error) { return 0, nil }

func (f *fake) Used(context.Context) (int64, error) { return 0, nil }

func (f *fake) List(context.Context) (int, error) { return 0, nil }

func (f *fake) PutBlob(context.Context, bench.LayerBlob) error { return nil }

func (f *fake) GetByBlob(ctx context.Context, _ bench.LayerBlob, _ bench.Immutable) (bench.Immutable, error) {
	return f.Merge(ctx, nil)
}

func (f *fake) Merge(context.Context, []bench.Immutable) (bench.Immutable, error) {
	return fakeImm("merge"), nil
}

func (f *fake) Diff(ctx context.Context, _, _ bench.Immutable) (bench.Immutable, error) {
	return f.Merge(ctx, nil)
}

func (f *fake) Close() error { return nil }

type (
	fakeRef string
	fakeImm string
)

func (r fakeRef) ID() string                                       { return string(r) }
func (r fakeRef) Change(context.Context, func(string) error) error { return nil }
func (r fakeRef) Commit(context.Context) (bench.Immutable, error)  { return fakeImm(r), nil }
func (r fakeRef) Release(context.Context) error                    { return nil }

func (i fakeImm) ID() string                                  { return string(i) }
func (i fakeImm) ReopenID() string                            { return string(i) }
func (i fakeImm) Finalize(context.Context) error              { return nil }
func (i fakeImm) SetValue(context.Context, bench.Value) error { return nil }
func (i fakeImm) Release(context.Context) error               { return nil }

func (i fakeImm) Extract(context.Context) error    { return nil }
func (i fakeImm) Blob(context.Context, bool) error { return nil }

func (i fakeImm) Checksum(context.Context) (string, error)           { return "digest", nil }
func (i fakeImm) ForgetChecksum(context.Context, bool) error         { return nil }
func (i fakeImm) ReportChange(context.Context, string, []byte) error { return nil }
