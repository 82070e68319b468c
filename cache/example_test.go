package cache_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

// exampleCache opens a cache in a directory that goes with it. It copies, and
// mounts nothing where the tests may not mount.
func exampleCache() (m *cache.Manager, done func()) {
	dir, err := os.MkdirTemp("", "lamina-example-")
	if err != nil {
		log.Fatal(err)
	}
	m, err = cache.Open(context.Background(), cache.Options{
		Root: filepath.Join(dir, "cache"), DriverName: "native", NoMounts: os.Geteuid() != 0,
	})
	if err != nil {
		log.Fatal(err)
	}
	return m, func() {
		if err := errors.Join(m.Close(), os.RemoveAll(dir)); err != nil {
			log.Fatal(err)
		}
	}
}

// exampleLayer commits a snapshot that holds one file.
func exampleLayer(m *cache.Manager, parent *cache.ImmutableRef, name, text string) *cache.ImmutableRef {
	ctx := context.Background()
	mut, err := m.New(ctx, parent, cache.NewOptions{})
	if err != nil {
		log.Fatal(err)
	}
	mnt, err := mut.Mount(ctx, cache.MountOptions{})
	if err != nil {
		log.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(mnt.Path(), name), []byte(text), 0o644), mnt.Unmount()); err != nil {
		log.Fatal(err)
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		log.Fatal(err)
	}
	return imm
}

func ExampleOpen() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "lamina-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	m, err := cache.Open(ctx, cache.Options{
		Root:        filepath.Join(dir, "cache"),
		LockTimeout: 5 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	u, err := m.DiskUsage(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(u.Records, "records")
	// Output: 0 records
}

func ExampleManager_New() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()

	mut, err := m.New(ctx, nil, cache.NewOptions{
		Type:        "regular",
		Description: "pulled from example.org/base",
		Labels:      map[string]string{"team": "build"},
		Values:      []cache.Value{{Name: "ref", Index: "ref:example.org/base"}},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer mut.Release(ctx)

	fmt.Println(mut.Record().State, mut.Record().Description)
	// Output: mutable pulled from example.org/base
}

func ExampleManager_New_child() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	base := exampleLayer(m, nil, "a", "1")
	defer base.Release(ctx)

	child, err := m.New(ctx, base, cache.NewOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer child.Release(ctx)

	fmt.Println("parent:", base.Record().State)
	// Output: parent: finalized
}

func ExampleMutableRef_Mount() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	mut, err := m.New(ctx, nil, cache.NewOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer mut.Release(ctx)

	mnt, err := mut.Mount(ctx, cache.MountOptions{})
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(mnt.Path(), "hello"), []byte("world"), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := mnt.Unmount(); err != nil {
		log.Fatal(err)
	}

	fmt.Println(len(mnt.Mounts()), "bind mount for a runtime")
	// Output: 1 bind mount for a runtime
}

func ExampleMutableRef_Commit() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	mut, err := m.New(ctx, nil, cache.NewOptions{})
	if err != nil {
		log.Fatal(err)
	}

	imm, err := mut.Commit(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer imm.Release(ctx)

	fmt.Println(imm.ID() == mut.ID(), imm.Record().State)
	// Output: true committed
}

func ExampleMutableRef_CommitWith() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	mut, err := m.New(ctx, nil, cache.NewOptions{})
	if err != nil {
		log.Fatal(err)
	}

	imm, err := mut.CommitWith(ctx, cache.CommitOptions{
		Cost: 90 * time.Second,
		Edit: func(e *cache.Edit) error {
			return e.SetValue(cache.Value{Name: "result", Index: "result:sha256:abc"})
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer imm.Release(ctx)

	fmt.Println(imm.Record().Cost, len(imm.Values()))
	// Output: 1m30s 1
}

func ExampleManager_Get() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	id := imm.ID()
	imm.Release(ctx)

	ref, err := m.Get(ctx, id, cache.GetOptions{})
	if errors.Is(err, errdefs.ErrNotFound) {
		fmt.Println("a miss")
		return
	}
	if err != nil {
		log.Fatal(err)
	}
	defer ref.Release(ctx)

	fmt.Println("a hit:", ref.Record().State)
	// Output: a hit: committed
}

func ExampleImmutableRef_Clone() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")

	twin, err := imm.Clone()
	if err != nil {
		log.Fatal(err)
	}
	imm.Release(ctx)
	imm.Release(ctx) // harmless: it never takes the twin's count
	fmt.Println(len(m.Refs(twin.ID())))
	twin.Release(ctx)
	fmt.Println(len(m.Refs(twin.ID())))
	// Output:
	// 1
	// 0
}

func ExampleImmutableRef_Mount() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	mnt, err := imm.Mount(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer mnt.Unmount()
	text, err := os.ReadFile(filepath.Join(mnt.Path(), "hello"))
	if err != nil {
		log.Fatal(err)
	}

	fmt.Println(string(text))
	// Output: world
}

func ExampleImmutableRef_Finalize() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	if err := imm.Finalize(ctx); err != nil {
		log.Fatal(err)
	}

	rec := imm.Record()
	fmt.Println(rec.State, rec.Key == string(rec.ID))
	// Output: finalized true
}

func ExampleManager_GetMutable() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	id := imm.ID()
	imm.Release(ctx) // nobody may hold what is reopened

	mut, err := m.GetMutable(ctx, id)
	if err != nil {
		log.Fatal(err)
	}
	_, err = m.Get(ctx, id, cache.GetOptions{})
	fmt.Println("the old id is gone:", errors.Is(err, errdefs.ErrNotFound))

	imm, err = mut.Commit(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer imm.Release(ctx)
	fmt.Println("a new id:", imm.ID() != id)
	// Output:
	// the old id is gone: true
	// a new id: true
}

func ExampleLockedError() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	_, err := m.GetMutable(ctx, imm.ID())
	var locked *cache.LockedError
	if errors.As(err, &locked) {
		for _, h := range locked.Holders {
			fmt.Println("held by:", h.Kind)
		}
	}
	// Output: held by: immutable handle
}

func ExampleImmutableRef_Edit() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	err := imm.Edit(ctx, func(e *cache.Edit) error {
		e.SetDescription("the greeting")
		e.SetLabel("team", "build")
		e.SetRetain(true)
		return e.Attach("log", []byte("built in 90 s"))
	})
	if err != nil {
		log.Fatal(err)
	}

	text, err := imm.Attachment(ctx, "log")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s: %s\n", imm.Record().Description, text)
	// Output: the greeting: built in 90 s
}

func ExampleImmutableRef_SetValue() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	for _, key := range []string{"step:1", "step:2"} {
		if err := imm.SetValue(ctx, cache.Value{Name: "step", Index: key}); err != nil {
			log.Fatal(err)
		}
	}

	old, err := m.Search(ctx, "step:1")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(imm.Values()), "value,", len(old), "under its former key")
	// Output: 1 value, 0 under its former key
}

func ExampleManager_Search() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)
	if err := imm.SetValue(ctx, cache.Value{Name: "ref", Index: "ref:example.org/base::v1"}); err != nil {
		log.Fatal(err)
	}

	exact, err := m.Search(ctx, "ref:example.org/base")
	if err != nil {
		log.Fatal(err)
	}
	all, err := m.SearchPrefix(ctx, "ref:example.org/base")
	if err != nil {
		log.Fatal(err)
	}

	fmt.Println(len(exact), len(all))
	// Output: 0 1
}

func ExampleMutableRef_Detach() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "lamina-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	options := cache.Options{Root: filepath.Join(dir, "cache"), DriverName: "native", NoMounts: true}
	m, err := cache.Open(ctx, options)
	if err != nil {
		log.Fatal(err)
	}

	mut, err := m.New(ctx, nil, cache.NewOptions{Retain: true})
	if err != nil {
		log.Fatal(err)
	}
	hold, err := mut.Detach(ctx)
	if err != nil {
		log.Fatal(err)
	}
	if err := m.Close(); err != nil {
		log.Fatal(err)
	}

	// Others can have the store open here, while this process writes. They
	// count the record as in use.

	m, err = cache.Open(ctx, options)
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	mut, err = m.Attach(ctx, hold)
	if err != nil {
		log.Fatal(err)
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer imm.Release(ctx)
	if err := hold.Release(); err != nil {
		log.Fatal(err)
	}

	fmt.Println(imm.Record().State)
	// Output: committed
}

func ExampleManager_Refs() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")

	mnt, err := imm.Mount(ctx)
	if err != nil {
		log.Fatal(err)
	}
	imm.Release(ctx)
	for _, h := range m.Refs(imm.ID()) {
		fmt.Println(h.Kind, "from", filepath.Base(filepath.Dir(h.Site)))
	}
	if err := mnt.Unmount(); err != nil {
		log.Fatal(err)
	}
	// Output: mount from cache
}

func ExampleManager_Remove() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	base := exampleLayer(m, nil, "a", "1")
	top := exampleLayer(m, base, "b", "2")
	base.Release(ctx)
	top.Release(ctx)

	out, err := m.Remove(ctx, base.ID())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("alone:", errors.Is(out[0].Err, errdefs.ErrFailedPrecondition))

	out, err = m.Remove(ctx, base.ID(), top.ID())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("with its child:", out[0].Err == nil && out[1].Err == nil)
	// Output:
	// alone: true
	// with its child: true
}

func ExampleCollectOptions() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "lamina-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	m, err := cache.Open(ctx, cache.Options{
		Root: filepath.Join(dir, "cache"),
		Collect: &cache.CollectOptions{
			Policies: []policy.Policy{{MaxUsed: policy.Percent(80), Target: policy.Percent(70)}},
			OnRemoved: func(s policy.Step, r cache.Removed) {
				log.Printf("%s: %s, %d bytes", r.ID, s.Message, r.Freed)
			},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()

	used, err := m.Used(ctx)
	fmt.Println(used, err)
	// Output: 0 <nil>
}

func ExampleManager_DiskUsage() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	base := exampleLayer(m, nil, "a", "1")
	top := exampleLayer(m, base, "b", "2")
	base.Release(ctx)
	top.Release(ctx)

	u, err := m.DiskUsage(ctx, func(rec *cache.Record) bool { return rec.State == cache.Committed })
	if err != nil {
		log.Fatal(err)
	}

	fmt.Println(u.Records, "record,", u.Reclaimable == u.Snapshots)
	// Output: 1 record, true
}

func ExampleManager_Sync() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	n, err := m.Sync(ctx)
	if err != nil {
		log.Fatal(err)
	}

	fmt.Println(n, imm.Record().Durable)
	// Output: 1 true
}

func ExampleManager_Check() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	imm := exampleLayer(m, nil, "hello", "world")
	defer imm.Release(ctx)

	found := 0
	for f, err := range m.Check(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(f.Code, f.ID, f.Message)
		found++
	}

	fmt.Println(found, "findings")
	// Output: 0 findings
}
