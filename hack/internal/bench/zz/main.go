package main

import (
	"context"
	"fmt"
	"os"
	"runtime/pprof"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func cpu() time.Duration {
	var u unix.Rusage
	must(unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func main() {
	ctx := context.Background()
	s, err := ours.Opener().Open(ctx, os.Args[1])
	must(err)
	var ids []string
	var refs []bench.Immutable
	for i := range 1000 {
		m, err := s.New(ctx, nil, bench.Value{Name: "bench", Data: fmt.Sprint(i), Index: fmt.Sprint("bench/", i)})
		must(err)
		imm, err := m.Commit(ctx)
		must(err)
		ids = append(ids, imm.ID())
		refs = append(refs, imm)
	}
	f, _ := os.Create(os.Args[2])
	db, err := bolt.Open(os.Args[1]+"/plain.db", 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	must(err)
	must(db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucket([]byte("r"))
		must(err)
		for i := range 1000 {
			must(b.Put(fmt.Appendf(nil, "%026d", i), make([]byte, 260)))
		}
		return nil
	}))
	must(pprof.StartCPUProfile(f))
	c := cpu()
	t := time.Now()
	n := 20000
	switch os.Args[3] {
	case "set":
		for i := range n {
			must(refs[i*7919%1000].SetValue(ctx, bench.Value{Name: "changing", Data: fmt.Sprint(i), Index: fmt.Sprintf("changing/%d", i)}))
		}
	case "bolt":
		for i := range n {
			must(db.Update(func(tx *bolt.Tx) error {
				return tx.Bucket([]byte("r")).Put(fmt.Appendf(nil, "%026d", i*7919%1000), make([]byte, 260))
			}))
		}
	case "reopen":
		n = 5000
		for i := range n {
			k := i * 7919 % 1000
			must(refs[k].Release(ctx))
			m, err := s.GetMutable(ctx, ids[k])
			must(err)
			imm, err := m.Commit(ctx)
			must(err)
			ids[k], refs[k] = imm.ID(), imm
		}
	case "search":
		n = 200000
		for i := range n {
			_, err := s.Search(ctx, fmt.Sprint("bench/", i%1000))
			must(err)
		}
	case "get":
		n = 200000
		for i := range n {
			r, err := s.Get(ctx, ids[i%1000])
			must(err)
			must(r.Release(ctx))
		}
	}
	fmt.Println(os.Args[3], "wall", time.Since(t)/time.Duration(n), "cpu", (cpu()-c)/time.Duration(n))
	pprof.StopCPUProfile()
	f.Close()
}
