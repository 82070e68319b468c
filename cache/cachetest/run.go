// Package cachetest proves that a cache keeps its promises on a driver. Prove is
// what a driver of somebody else calls in its tests. Of that, Run
// plays random histories of all operations, with failures, cancellations, kills
// and power cuts in the middle of them, and compares whatever can be seen with
// a small model, which is the specification of package cache in some 300 lines.
//
// A history that fails is shortened to the few operations that matter, and
// printed with the command that repeats it.
package cachetest

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// Opener makes the driver of the store below root, or opens it again after
// Close: what was there is there again. A driver that is Trees needs no
// mounts and no privileges.
type Opener func(root string) (snapshot.Driver, error)

// Options say how much Run does. The zero value is a minute's work on a driver
// that mounts.
type Options struct {
	// Histories is how many histories are played, 250 if zero, and Length
	// how many operations each has, 200 if zero.
	Histories, Length int
	// Seed is that of the first history, 1 if zero; each next one has the
	// next number. The same seed is the same history on every driver.
	Seed uint64
	// Dir is where the stores are made, t.TempDir() if empty. Memory is
	// fastest.
	Dir string
	// Seen, if set, is told what each history did and what came of it, which
	// is the same on every driver. It is called by several goroutines.
	Seen func(seed uint64, trace []string)
}

// The environment overrides Options: the first seed, and one history spelled
// out, as a failure prints it.
const (
	envSeed = "LAMINA_HISTORY_SEED"
	envOps  = "LAMINA_HISTORY_OPS"
)

// Prove has a driver of somebody else prove itself: that it keeps the contract
// of snapshot.Driver (snapshottest.Run, with containerd's own suite in it, for
// which name is), and that a cache keeps its promises on it, whatever fails, and
// to many clients at once. It needs root, and is skipped without.
func Prove(t *testing.T, name string, open Opener, o Options) {
	t.Helper()
	t.Run("Driver", func(t *testing.T) {
		snapshottest.Run(t, name, func(t *testing.T, root string) snapshot.Driver {
			d, err := open(root)
			if err != nil {
				t.Fatal(err)
			}
			return d
		})
	})
	t.Run("Histories", func(t *testing.T) { Run(t, open, o) })
	t.Run("Layers", func(t *testing.T) { RunLayers(t, open, o) })
	t.Run("Concurrent", func(t *testing.T) { RunConcurrent(t, open, o) })
}

// Run plays histories on stores of the driver that open gives.
func Run(t *testing.T, open Opener, o Options) {
	t.Helper()
	r := newRunner(t, o, game{
		what: "histories", operations: namesOf(operations()), reach: 8,
		begin: func(dir string) player { return newHistory(open, filepath.Join(dir, "store")) },
	})
	r.run()
}

// Memory opens drivers in memory, one for each root as long as its directory is
// there.
func Memory() Opener {
	var mu sync.Mutex
	drivers := map[string]*snapshottest.Memory{}
	return func(root string) (snapshot.Driver, error) {
		mu.Lock()
		defer mu.Unlock()
		if d := drivers[root]; d != nil {
			return d, nil
		}
		for other := range drivers {
			if _, err := os.Lstat(other); err != nil {
				delete(drivers, other)
			}
		}
		drivers[root] = snapshottest.NewMemory()
		return drivers[root], nil
	}
}
