package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"golang.org/x/sys/unix"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func build(dir string, n int) {
	ctx := context.Background()
	m, err := cache.Open(ctx, cache.Options{Root: dir, SyncInterval: -1})
	must(err)
	base := mk(m, nil)
	must(base.SetValue(ctx, cache.Value{Name: "base", Data: []byte("1"), Index: "base"}))
	for i := 1; i < n; {
		var p *cache.ImmutableRef
		for k := 0; k < 10 && i < n; k++ {
			next := mk(m, p)
			if p != nil {
				must(p.Release(ctx))
			}
			p = next
			i++
		}
		must(p.Release(ctx))
	}
	must(base.Release(ctx))
	_, err = m.Measure(ctx)
	must(err)
	_, err = m.Sync(ctx)
	must(err)
	must(m.Close())
}

func mk(m *cache.Manager, p *cache.ImmutableRef) *cache.ImmutableRef {
	ctx := context.Background()
	mut, err := m.New(ctx, p, cache.NewOptions{Values: []cache.Value{{Name: "bench", Data: []byte("1")}}})
	must(err)
	mnt, err := mut.Mount(ctx, cache.MountOptions{})
	must(err)
	must(os.WriteFile(filepath.Join(mnt.Path(), "file"), make([]byte, 4096), 0o600))
	must(mnt.Unmount())
	imm, err := mut.Commit(ctx)
	must(err)
	must(imm.Finalize(ctx))
	return imm
}

func main() {
	n := flag.Int("build", 0, "")
	dir := flag.String("dir", "", "")
	stack := flag.Bool("stack", false, "")
	cpu := flag.String("cpu", "", "")
	idleN := flag.Int("idle", 3000, "")
	think := flag.Duration("think", 0, "")
	list := flag.Int("list", 0, "")
	mem := flag.String("mem", "", "")
	quiet := flag.Bool("quiet", false, "no foreground")
	flag.Parse()
	if *n > 0 {
		build(*dir, *n)
		return
	}
	ctx := context.Background()
	if *mem != "" {
		runtime.MemProfileRate = 4096
		defer func() {
			f, _ := os.Create(*mem)
			must(pprof.Lookup("allocs").WriteTo(f, 0))
			f.Close()
		}()
	}
	m, err := cache.Open(ctx, cache.Options{Root: *dir, SyncInterval: -1})
	must(err)
	if *list > 0 {
		if *cpu != "" {
			f, _ := os.Create(*cpu)
			must(pprof.StartCPUProfile(f))
			defer pprof.StopCPUProfile()
		}
		for range *list {
			var ms0, ms1 runtime.MemStats
			runtime.ReadMemStats(&ms0)
			t := time.Now()
			u, err := m.DiskUsage(ctx, nil)
			must(err)
			d := time.Since(t)
			runtime.ReadMemStats(&ms1)
			fmt.Println(len(u.Entries), d, (ms1.Mallocs-ms0.Mallocs)/uint64(len(u.Entries)), (ms1.TotalAlloc-ms0.TotalAlloc)/uint64(len(u.Entries)))
		}
		must(m.Close())
		return
	}
	ids, err := m.Search(ctx, "base")
	must(err)
	base, err := m.Get(ctx, ids[0], cache.GetOptions{})
	must(err)
	runtime.LockOSThread()
	tid := unix.Gettid()
	var sampling atomic.Bool
	stacks := map[string]int{}
	var inNew atomic.Int64
	if *stack {
		go func() {
			runtime.LockOSThread()
			f, err := os.Open(fmt.Sprintf("/proc/self/task/%d/stack", tid))
			must(err)
			buf := make([]byte, 8192)
			st, err := os.Open(fmt.Sprintf("/proc/self/task/%d/stat", tid))
			must(err)
			for {
				time.Sleep(100 * time.Microsecond)
				t0 := inNew.Load()
				if !sampling.Load() || t0 == 0 || time.Now().UnixNano()-t0 < 500_000 {
					continue
				}
				k, _ := st.ReadAt(buf, 0)
				fl := strings.Fields(string(buf[:k]))
				if len(fl) < 3 || fl[2] == "R" {
					stacks["running"]++
					continue
				}
				k, _ = f.ReadAt(buf, 0)
				if inNew.Load() == t0 {
					stacks[string(buf[:k])]++
				}
			}
		}()
	}
	var syncTimes []time.Duration
	_ = syncTimes
	sf, err := os.Open(fmt.Sprintf("/proc/self/task/%d/schedstat", tid))
	must(err)
	sbuf := make([]byte, 100)
	delay := func() time.Duration {
		k, _ := sf.ReadAt(sbuf, 0)
		var a, b int64
		fmt.Sscan(string(sbuf[:k]), &a, &b)
		return time.Duration(b)
	}
	var net [2][]time.Duration
	phase := 0
	call := func(into *[3][]time.Duration) {
		d0 := delay()
		t := time.Now()
		inNew.Store(t.UnixNano())
		mut, err := m.New(ctx, base, cache.NewOptions{})
		inNew.Store(0)
		lat := time.Since(t)
		into[0] = append(into[0], lat)
		net[phase] = append(net[phase], lat-(delay()-d0))
		must(err)
		must(mut.Release(ctx))
		t = time.Now()
		r, err := m.Get(ctx, base.ID(), cache.GetOptions{})
		into[1] = append(into[1], time.Since(t))
		must(err)
		t = time.Now()
		must(r.Release(ctx))
		into[2] = append(into[2], time.Since(t))
		if *think > 0 {
			time.Sleep(*think)
		}
	}
	var idle, busy [3][]time.Duration
	for range *idleN {
		call(&idle)
	}
	if *cpu != "" {
		f, _ := os.Create(*cpu)
		must(pprof.StartCPUProfile(f))
	}
	sampling.Store(true)
	phase = 1
	done := make(chan struct{})
	start := time.Now()
	var removed int
	var took time.Duration
	go func() {
		defer close(done)
		s, err := m.Prune(ctx, policy.Policy{All: true})
		must(err)
		removed = s.Removed
		took = time.Since(start)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
			if *quiet {
				time.Sleep(time.Millisecond)
			} else {
				call(&busy)
			}
		}
	}
	sampling.Store(false)
	if *cpu != "" {
		pprof.StopCPUProfile()
	}
	fmt.Printf("removed %d in %v, %v each\n", removed, took, took/time.Duration(removed))
	for i, w := range []string{"New", "Get", "Release"} {
		slices.Sort(idle[i])
		slices.Sort(busy[i])
		q := func(t []time.Duration, f float64) time.Duration {
			if len(t) == 0 {
				return 0
			}
			return t[int(f*float64(len(t)-1))]
		}
		fmt.Printf("%-8s idle n=%d p50=%v p90=%v p99=%v max=%v | busy n=%d p50=%v p90=%v p99=%v p999=%v max=%v\n", w,
			len(idle[i]), q(idle[i], .5), q(idle[i], .9), q(idle[i], .99), q(idle[i], 1),
			len(busy[i]), q(busy[i], .5), q(busy[i], .9), q(busy[i], .99), q(busy[i], .999), q(busy[i], 1))
	}
	for i := range net {
		slices.Sort(net[i])
		t := net[i]
		if len(t) > 0 {
			fmt.Println("New without run queue", []string{"idle", "busy"}[i], t[len(t)/2], t[len(t)*9/10], t[len(t)*99/100], t[len(t)*999/1000], t[len(t)-1])
		}
	}
	if *stack {
		type kv struct {
			s string
			n int
		}
		var l []kv
		for s, n := range stacks {
			l = append(l, kv{s, n})
		}
		sort.Slice(l, func(i, j int) bool { return l[i].n > l[j].n })
		for i, x := range l {
			if i > 12 {
				break
			}
			fmt.Println(x.n, strings.ReplaceAll(x.s, "\n", " "))
		}
	}
	must(base.Release(ctx))
	must(m.Close())
}
