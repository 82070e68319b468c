package cache_test

import (
	"context"
	"os"
	"testing"

	"github.com/lamina-build/lamina/cache/cachetest"
	"github.com/lamina-build/lamina/snapshot"
)

// Layers of random trees, whichever way they came, stack as they apply, on
// drivers that stack and on those that copy, with failures and kills between.
func TestLayerHistories(t *testing.T) {
	userKind := kind{"overlay-user", func(root string) (snapshot.Driver, error) {
		return snapshot.Open(context.Background(), root, snapshot.Options{Driver: snapshot.Overlay, Attributes: snapshot.User})
	}}
	few := 4
	if underRace {
		few = 2
	}
	o := cachetest.Options{Histories: histories(t, 50*few) / 50, Length: 60}
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		o.Histories, o.Seed = 1000, seed(t)
	}
	for _, k := range append(kinds, userKind) {
		t.Run(k.name, func(t *testing.T) {
			needRoot(t)
			o.Dir = fastDir(t)
			cachetest.RunLayers(t, k.open, o)
		})
	}
}
