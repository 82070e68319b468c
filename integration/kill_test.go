package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// killing runs the command in many processes on one store and kills some of
// them at random moments. Each run of a key leaves a token in its workspace.
type killing struct {
	*testing.T
	root string

	mu sync.Mutex
	// Guarded by mu.
	rand   *rand.Rand
	kept   map[string][]string // by key: tokens of runs that said they are done
	made   []string            // ids of records that were acknowledged
	killed int

	// kills is how many are wanted.
	kills int
}

func (k *killing) random(n int) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rand.IntN(n)
}

// lamina runs the command, and kills it after some time if wanted. ok says
// that it came to a good end before that.
func (k *killing) lamina(kill bool, args ...string) (stdout, stderr string, ok bool) {
	ctx := context.Background()
	if kill {
		// Long enough for most steps of a run, and short enough to hit all.
		wait := time.Duration(k.random(120_000)) * time.Microsecond
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, laminaBinary, append([]string{"--root", k.root, "--wait", "60s", "--json"}, args...)...)
	var out, talk bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &talk
	err := cmd.Run()
	if ctx.Err() != nil && err != nil {
		k.mu.Lock()
		k.killed++
		k.mu.Unlock()
		return "", "", false
	}
	if err != nil {
		k.Errorf("lamina %q: %v\n%s%s", args, err, out.String(), talk.String())
		return "", "", false
	}
	return out.String(), talk.String(), true
}

// enough says whether as many processes were killed as were asked for. How
// many rounds that takes is up to the machine.
func (k *killing) enough() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.killed >= k.kills
}

// workspaces runs builds of a few keys.
func (k *killing) workspaces(worker int) {
	for n := 0; !k.enough() && !k.Failed(); n++ {
		key := fmt.Sprintf("key-%d", k.random(3))
		token := fmt.Sprintf("token-%d-%d", worker, n)
		script := "echo " + token + " >> tokens; cat tokens"
		// What was acknowledged before this run began is in what it shows. The
		// other worker's next run may be acknowledged before this one is looked at.
		k.mu.Lock()
		before := slices.Clone(k.kept[key])
		k.mu.Unlock()
		out, _, ok := k.lamina(k.random(3) > 0, "run", "--key", key, "--no-memo", "--", "sh", "-c", script)
		if !ok {
			continue
		}
		k.mu.Lock()
		for _, kept := range before {
			if !strings.Contains(out, kept+"\n") {
				k.Errorf("%s of %s was acknowledged and is gone", kept, key)
			}
		}
		k.kept[key] = append(k.kept[key], token)
		k.mu.Unlock()
	}
}

// records makes, commits and removes records one by one.
func (k *killing) records() {
	for !k.enough() && !k.Failed() {
		out, _, ok := k.lamina(k.random(3) == 0, "new", "--label", "test=kill")
		if !ok {
			continue
		}
		var rec struct{ ID string }
		if err := json.Unmarshal([]byte(out), &rec); err != nil {
			k.Error(err)
			continue
		}
		if _, _, ok := k.lamina(k.random(3) == 0, "commit", rec.ID); !ok {
			continue
		}
		if k.random(2) == 0 {
			k.lamina(k.random(3) == 0, "finalize", rec.ID)
		}
		if k.random(3) == 0 {
			// Acknowledged or not, it may be gone now.
			k.lamina(k.random(2) == 0, "rm", rec.ID)
			continue
		}
		k.mu.Lock()
		k.made = append(k.made, rec.ID)
		k.mu.Unlock()
	}
}

func TestKilledCommands(t *testing.T) {
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) { testKilledCommands(t, driver, t.TempDir(), 50) })
	}
}

// Of btrfs no power can be cut, since it cannot be shut down like ext4 and XFS.
func TestKilledCommandsOnBtrfs(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	d := newDisk(t, "btrfs", 256<<20)
	testKilledCommands(t, "overlay", d.dir, 20)
}

func testKilledCommands(t *testing.T, driver, dir string, kills int) {
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		kills = 250
	}
	seed := newSeed(t)
	k := &killing{T: t, root: filepath.Join(dir, "store"), kills: kills, rand: rand.New(rand.NewPCG(seed, 2)), kept: map[string][]string{}}
	t.Cleanup(func() {
		// overlayfs leaves directories behind that an ordinary user has to
		// open before they can be removed.
		out, err := exec.Command("chmod", "-R", "u+rwX", k.root).CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
	if out, err := exec.Command(laminaBinary, "--root", k.root, "--driver", driver, "new").CombinedOutput(); err != nil {
		if driver == "overlay" && os.Geteuid() != 0 {
			t.Skipf("no overlay for an ordinary user here: %s", out)
		}
		require.NoError(t, err, "%s", out)
	}
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() { k.workspaces(worker) })
	}
	wg.Go(func() { k.records() })
	wg.Wait()
	if t.Failed() {
		return
	}
	t.Logf("rig: seed %d: %d processes killed", seed, k.killed)

	for key, tokens := range k.kept {
		out, _, ok := k.lamina(false, "run", "--key", key, "--no-memo", "--", "cat", "tokens")
		require.True(t, ok)
		for _, token := range tokens {
			require.Equal(t, 1, strings.Count(out, token+"\n"), "%s of %s", token, key)
		}
	}
	for _, id := range k.made {
		_, _, ok := k.lamina(false, "show", id)
		require.True(t, ok, "record %s was acknowledged", id)
	}
	_, _, ok := k.lamina(false, "check")
	require.True(t, ok)
	// What a killed command leaves dies soon, not at once.
	require.Eventually(t, func() bool { return !worksIn(k.root) }, time.Minute, 10*time.Millisecond, "a process of a killed command lives on")
	data, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(data), k.root)
}

// worksIn says whether any process has its working directory below root.
func worksIn(root string) bool {
	dirs, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range dirs {
		if dir, err := os.Readlink(link); err == nil && strings.HasPrefix(dir, root) {
			return true
		}
	}
	return false
}
