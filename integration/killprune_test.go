package integration

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// pruned is a store of which a prune takes a part: record by record what its
// snapshot holds, and whether it is to stay.
type pruned struct {
	root  string
	files map[string]string
	stays map[string]bool
}

// makePruned makes chains of records. Of each chain the lower part stays, as
// its last record has a label, and the upper part goes.
func makePruned(t *testing.T, driver string, random *rand.Rand) *pruned {
	ctx := t.Context()
	p := &pruned{root: filepath.Join(t.TempDir(), "store"), files: map[string]string{}, stays: map[string]bool{}}
	m, err := cache.Open(ctx, cache.Options{Root: p.root, DriverName: driver, SyncInterval: -1})
	require.NoError(t, err)
	for chain := range 30 {
		var parent *cache.ImmutableRef
		length := 1 + random.IntN(12)
		kept := random.IntN(length) // of chain 0, 2, 4 and so on this one has the label
		var ids []string
		for depth := range length {
			o := cache.NewOptions{}
			if depth == kept && chain%2 == 0 {
				o.Labels = map[string]string{"keep": "yes"}
			}
			mut, err := m.New(ctx, parent, o)
			require.NoError(t, err)
			mnt, err := mut.Mount(ctx, cache.MountOptions{})
			require.NoError(t, err)
			text := fmt.Sprintf("chain %d, depth %d", chain, depth)
			require.NoError(t, os.MkdirAll(filepath.Join(mnt.Path(), "d", fmt.Sprint(depth)), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(mnt.Path(), "d", fmt.Sprint(depth), "file"), []byte(text), 0o644))
			require.NoError(t, mnt.Unmount())
			imm, err := mut.Commit(ctx)
			require.NoError(t, err)
			require.NoError(t, imm.Finalize(ctx))
			if parent != nil {
				require.NoError(t, parent.Release(ctx))
			}
			parent = imm
			id := string(imm.ID())
			p.files[id] = text
			ids = append(ids, id)
			if depth == kept && chain%2 == 0 {
				for _, below := range ids {
					p.stays[below] = true
				}
			}
		}
		require.NoError(t, parent.Release(ctx))
	}
	_, err = m.Measure(ctx)
	require.NoError(t, err)
	require.NoError(t, m.Close())
	return p
}

// copyTo makes a copy of the store, with attributes and links.
func (p *pruned) copyTo(t *testing.T, root string) {
	out, err := exec.Command("cp", "-a", "--", p.root, root).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// kill prunes a store with the command and kills it after a while. It says
// whether that came before the end.
func (p *pruned) kill(t *testing.T, root string, after time.Duration) (killed bool) {
	ctx, cancel := context.WithTimeout(t.Context(), after)
	defer cancel()
	cmd := exec.CommandContext(ctx, laminaBinary, "--root", root, "--json", "prune", "--yes", "--filter", "labels.keep!=yes")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err == nil {
		return false
	}
	require.Error(t, ctx.Err(), "%v: %s", err, out.String())
	return true
}

// verify opens the store as the next command would, and looks at each record.
func (p *pruned) verify(t *testing.T, root string) (gone int) {
	ctx := t.Context()
	m, err := cache.Open(ctx, cache.Options{Root: root, SyncInterval: -1})
	require.NoError(t, err)
	for f, err := range m.Check(ctx) {
		require.NoError(t, err)
		t.Errorf("after a kill and an open: %s %s %s", f.Code, f.ID, f.Message)
	}
	for id, text := range p.files {
		imm, err := m.Get(ctx, cache.ID(id), cache.GetOptions{NoUpdate: true})
		if err != nil {
			require.False(t, p.stays[id], "record %s was no victim: %v", id, err)
			gone++
			continue
		}
		// What is there is there with all that lies below it.
		mnt, err := imm.Mount(ctx)
		require.NoError(t, err, "record %s", id)
		depth := 0
		for ; ; depth++ {
			data, err := os.ReadFile(filepath.Join(mnt.Path(), "d", fmt.Sprint(depth), "file"))
			require.NoError(t, err, "record %s", id)
			if string(data) == text {
				break
			}
		}
		require.NoError(t, mnt.Unmount())
		require.NoError(t, imm.Release(ctx))
	}
	require.NoError(t, m.Close())
	// Of what went nothing is left on the disk.
	for dir, most := range map[string]int{"committed": len(p.files) - gone, "active": 0, "trash": 0, "new": 0} {
		names, err := os.ReadDir(filepath.Join(root, "snapshots", dir))
		require.NoError(t, err)
		require.Len(t, names, most, dir)
	}
	return gone
}

// TestKilledPrunes: a prune that is killed at any moment has taken nothing but
// victims, each of them wholly or not at all, and the next one ends the work.
func TestKilledPrunes(t *testing.T) {
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("an ordinary user mounts in a namespace of its own only; the scripts have that")
			}
			kills := 3
			if os.Getenv("LAMINA_TEST_FULL") != "" {
				kills = 100
			}
			seed := newSeed(t)
			random := rand.New(rand.NewPCG(seed, 7))
			p := makePruned(t, driver, random)
			victims := len(p.files) - len(p.stays)
			root := filepath.Join(t.TempDir(), "copy")

			// What a prune takes when nobody kills it is where kills may come.
			p.copyTo(t, root)
			start := time.Now()
			require.False(t, p.kill(t, root, time.Hour))
			took := time.Since(start)
			require.Equal(t, victims, p.verify(t, root))

			killed, partly, rounds := 0, 0, 0
			for ; killed < kills; rounds++ {
				require.NoError(t, os.RemoveAll(root))
				p.copyTo(t, root)
				if !p.kill(t, root, time.Duration(random.Int64N(int64(took)))) {
					took = max(took*3/4, 10*time.Millisecond) // it was quicker
					continue
				}
				killed++
				if gone := p.verify(t, root); 0 < gone && gone < victims {
					partly++
				}
				require.False(t, p.kill(t, root, time.Hour))
				require.Equal(t, victims, p.verify(t, root))
			}
			t.Logf("driver %s, seed %d: %d records, %d victims, %d prunes killed in %d rounds, %d of them with some of the victims gone",
				driver, seed, len(p.files), victims, killed, rounds, partly)
		})
	}
}
