package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
	"runtime"

	"github.com/lamina-build/lamina/migrate"
)

func TestZZ(t *testing.T) {
	dir := os.Getenv("ZZ")
	if dir == "" {
		t.Skip()
	}
	cpu := func() time.Duration {
		var u syscall.Rusage
		syscall.Getrusage(0, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	s := &legacyState{dir: dir}
	if err := s.migrate(context.Background(), migrate.Options{Step: func(n string) error {
		if n == "build rows" {
			s.transactions++
		}
		return nil
	}}); err != nil {
		t.Fatal(err)
	}
	st, _ := os.Stat(filepath.Join(dir, "lamina.db"))
	s.bytes = st.Size()
	fmt.Println("bytes", s.bytes, "tx", s.transactions)
	if err := s.rollBack(context.Background()); err != nil {
		t.Fatal(err)
	}
	l := &limits{dir: t.TempDir(), legacy: map[int]*legacyState{1: s}}
	for range 3 {
		runtime.GC()
		c0 := cpu()
		b0 := time.Now()
		if err := s.migrate(context.Background(), migrate.Options{}); err != nil {
			t.Fatal(err)
		}
		c1 := cpu()
		w1 := time.Since(b0)
		if err := s.rollBack(context.Background()); err != nil {
			t.Fatal(err)
		}
		runtime.GC()
		x, _ := limitMigrate(context.Background(), l, 1)
		c2 := cpu()
		b1 := time.Now()
		if err := x.run(context.Background()); err != nil {
			t.Fatal(err)
		}
		fmt.Println("ours cpu", c1-c0, "wall", w1, "limit cpu", cpu()-c2, "wall", time.Since(b1))
		x.after(context.Background())
	}
}
