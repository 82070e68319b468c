package cache_test

import (
	"maps"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// TestLayersFailAtEveryStep fails each durable step of the scenarios in turn.
// What failed can be done again at once, and when the store is opened anew it is
// sound and shows what it should.
func TestLayersFailAtEveryStep(t *testing.T) {
	needRoot(t)
	for _, k := range []kind{overlayKind, nativeKind} {
		for _, sc := range layerScenarios {
			if sc.name == "remove" {
				continue // what is gone cannot be removed again
			}
			t.Run(k.name+"/"+sc.name, func(t *testing.T) {
				failed := 0
				for i, reached := 1, true; reached; i++ {
					t.Run("", func(t *testing.T) {
						n, on := 0, false
						step := func(string) error {
							if on {
								if n++; n == i {
									return errInjected
								}
							}
							return nil
						}
						w := newWorldIn(t, k, filepath.Join(fastDir(t), "store"), step)
						s := &layerStore{world: w, r: newRegistry(), want: map[cache.ID]string{}, refs: map[string]*cache.ImmutableRef{}}
						sc.prepare(s)
						on = true
						err := sc.do(s)
						on, reached = false, n >= i
						if err != nil {
							require.ErrorIs(t, err, errInjected)
							failed++
							require.NoError(t, sc.do(s), "again after %v", err)
						}
						s.sure = slices.Collect(maps.Keys(s.want))
						w.reopenStore()
						s.examine("after "+sc.name, w.Manager)
					})
				}
				require.Positive(t, failed)
			})
		}
	}
}
