package cache_test

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache/cachetest"
)

// histories is how many a test plays: few, or as many as LAMINA_HISTORIES says,
// which hack/test sets for the run without the race detector.
func histories(t *testing.T, few int) int {
	text := os.Getenv("LAMINA_HISTORIES")
	if text == "" {
		return few
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	return n
}

// untilKilled is what a history saw before the first kill: how far an operation
// got that was cut may depend on the driver, within what the model allows.
func untilKilled(trace []string) []string {
	if i := slices.IndexFunc(trace, func(line string) bool { return strings.Contains(line, "the process died") }); i >= 0 {
		return trace[:i]
	}
	return trace
}

// The same histories on all drivers show the same: many in memory, and the
// first of them on those that have directories.
func TestHistories(t *testing.T) {
	few := 200
	if underRace {
		few = 40 // most of it is one goroutine, which has no races
	}
	o := cachetest.Options{Histories: histories(t, few), Dir: fastDir(t)}
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		o.Histories, o.Seed = 50_000, seed(t)
	}
	compared := uint64(max(o.Histories/20, 10))
	var mu sync.Mutex
	inMemory := map[uint64][]string{}
	if n, err := strconv.ParseUint(os.Getenv("LAMINA_HISTORY_SEED"), 10, 64); err == nil {
		o.Seed = n
	}
	first := max(o.Seed, 1)
	o.Seen = func(seed uint64, trace []string) {
		if seed < first+compared {
			mu.Lock()
			defer mu.Unlock()
			inMemory[seed] = untilKilled(trace)
		}
	}
	t.Run("memory", func(t *testing.T) { cachetest.Run(t, cachetest.Memory(), o) })

	o.Histories = min(o.Histories, int(compared))
	for _, k := range []kind{overlayKind, nativeKind} {
		t.Run(k.name, func(t *testing.T) {
			needRoot(t)
			o.Dir = fastDir(t)
			o.Seen = func(seed uint64, trace []string) {
				if want, there := inMemory[seed]; there && !cmp.Equal(want, untilKilled(trace)) {
					t.Errorf("the history of seed %d looks otherwise than in memory:\n%s", seed, cmp.Diff(want, untilKilled(trace)))
				}
			}
			cachetest.Run(t, k.open, o)
		})
	}
}

// Whatever several clients see of one cache, they could have seen one after the
// other.
func TestLinearizable(t *testing.T) {
	o := cachetest.Options{Histories: min(histories(t, 300), 1000), Dir: fastDir(t)}
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		o.Histories, o.Seed = 20_000, seed(t)
	}
	cachetest.RunConcurrent(t, cachetest.Memory(), o)
}
