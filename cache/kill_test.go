package cache_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// The kill test. Processes that work on one store at random are killed at
// random moments. Each says on its standard output what it is about to do and
// what was acknowledged; the test keeps the books and compares after each kill.

// loader is what one goroutine of such a process works with.
type loader struct {
	m   *cache.Manager
	rng *rand.Rand
	say func(words ...any)
	ids []cache.ID // immutable records of its own
}

// helpLoad runs until it is killed.
func helpLoad(args []string) error {
	root, kindName := args[0], args[1]
	n, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return err
	}
	d, err := kindNamed(kindName).open(root)
	if err != nil {
		return err
	}
	m, err := cache.Open(context.Background(), cache.Options{Root: root, Driver: d, BootID: "this boot"})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	say := func(words ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(words...) // one write, which a kill does not take back
	}
	failures := make(chan error)
	for i := range 3 {
		l := &loader{m: m, rng: rand.New(rand.NewPCG(n, uint64(i))), say: say}
		go func() {
			for {
				if err := l.act(context.Background()); err != nil {
					failures <- err
				}
			}
		}()
	}
	return <-failures
}

func (l *loader) pick() (id cache.ID, take func()) {
	i := l.rng.IntN(len(l.ids))
	return l.ids[i], func() { l.ids = append(l.ids[:i], l.ids[i+1:]...) }
}

// act does one thing. What others of this process hold or need is left alone.
func (l *loader) act(ctx context.Context) error {
	if len(l.ids) < 3 {
		return l.create(ctx, nil)
	}
	id, take := l.pick()
	switch l.rng.IntN(6) {
	case 0:
		return l.create(ctx, nil)
	case 1:
		parent, err := l.m.Get(ctx, id, cache.GetOptions{})
		if err != nil {
			return err
		}
		l.say("try-finalize", id)
		return errors.Join(l.create(ctx, parent), parent.Release(ctx))
	case 2:
		imm, err := l.m.Get(ctx, id, cache.GetOptions{})
		if err != nil {
			return err
		}
		l.say("try-finalize", id)
		if err := imm.Finalize(ctx); err != nil {
			return err
		}
		l.say("finalized", id)
		return imm.Release(ctx)
	case 3:
		l.say("try-remove", id)
		out, err := l.m.Remove(ctx, id)
		if err == nil && out[0].Err == nil {
			l.say("removed", id)
			take()
		} else if err == nil && !errdefs.IsFailedPrecondition(out[0].Err) {
			err = out[0].Err
		} else {
			l.say("kept", id)
		}
		return err
	default:
		return l.reopen(ctx, id, take)
	}
}

func (l *loader) create(ctx context.Context, parent *cache.ImmutableRef) error {
	mut, err := l.m.New(ctx, parent, cache.NewOptions{Retain: l.rng.IntN(2) == 0})
	if err != nil {
		return err
	}
	return l.commit(ctx, mut)
}

func (l *loader) reopen(ctx context.Context, id cache.ID, take func()) error {
	l.say("try-reopen", id)
	mut, err := l.m.GetMutable(ctx, id)
	if errdefs.IsFailedPrecondition(err) {
		l.say("kept", id)
		return nil
	}
	if err != nil {
		return err
	}
	l.say("reopened", id, mut.ID())
	take()
	return l.commit(ctx, mut)
}

func (l *loader) commit(ctx context.Context, mut *cache.MutableRef) error {
	if err := sign(ctx, mut, ""); err != nil {
		return err
	}
	l.say("try-commit", mut.ID())
	imm, err := mut.Commit(ctx)
	if err != nil {
		return err
	}
	l.say("committed", imm.ID())
	l.ids = append(l.ids, imm.ID())
	return imm.Release(ctx)
}

// books are what the test knows of one store. Of each id: the state that was
// acknowledged last, and what somebody was about to do when he was killed.
type books struct {
	state map[cache.ID]string
	doing map[cache.ID]string
	acks  int
}

func (b *books) note(line string) {
	f := strings.Fields(line)
	id := cache.ID(f[1])
	if what, ok := strings.CutPrefix(f[0], "try-"); ok {
		if b.doing[id] == "" {
			b.doing[id] = what
		}
		return
	}
	delete(b.doing, id)
	b.acks++
	switch f[0] {
	case "kept":
		b.acks--
	case "reopened":
		b.state[id] = "gone"
		b.state[cache.ID(f[2])] = "mutable"
	case "removed":
		b.state[id] = "gone"
	default:
		b.state[id] = f[0]
	}
}

// compare says what of the store contradicts the books, and brings them up to
// date.
func (b *books) compare(w *world) {
	for id, state := range b.state {
		doing := b.doing[id]
		rec, err := w.Lookup(w.ctx, id)
		if errdefs.IsNotFound(err) {
			require.True(w, state == "gone" || doing == "remove" || doing == "reopen", "%s record %s is lost (%q)", state, id, doing)
			b.state[id] = "gone"
			continue
		}
		require.NoError(w, err)
		switch state {
		case "gone":
			require.Fail(w, "came back", "record %s is %s", id, rec.State)
		case "finalized":
			require.Equal(w, cache.Finalized, rec.State, "%s", id)
		case "committed":
			require.True(w, rec.State == cache.Committed || rec.State == cache.Finalized, "%s is %s", id, rec.State)
		case "mutable":
			require.True(w, rec.State == cache.Mutable || doing == "commit", "%s is %s", id, rec.State)
		}
	}
	clear(b.doing)
	for rec, err := range w.Records(w.ctx) {
		require.NoError(w, err)
		if rec.State == cache.Mutable {
			b.state[rec.ID] = "mutable"
			continue
		}
		b.state[rec.ID] = "committed"
		if rec.State == cache.Finalized {
			b.state[rec.ID] = "finalized"
		}
		imm := w.get(rec.ID)
		require.NoError(w, checkSignature(w.ctx, imm))
		w.release(imm)
	}
}

func TestKilledProcesses(t *testing.T) {
	kills := 20
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		kills = 100
	}
	n := seed(t)
	t.Logf("rig: %d kills", kills)
	for i, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			w := newWorld(t, k)
			w.closeStore()
			rng := rand.New(rand.NewPCG(n, uint64(i)))
			b := &books{state: map[cache.ID]string{}, doing: map[cache.ID]string{}}
			for at := i; at < kills; at += len(kinds) {
				child := startHelper(t, "load", w.root, k.name, strconv.FormatUint(rng.Uint64(), 10))
				for range 1 + rng.IntN(60) {
					b.note(child.line())
				}
				require.NoError(t, child.cmd.Process.Kill())
				rest, err := io.ReadAll(child.out)
				require.NoError(t, err)
				child.kill()
				for line := range strings.Lines(string(rest)) {
					if line, whole := strings.CutSuffix(line, "\n"); whole {
						b.note(line)
					}
				}
				w.reopenStore()
				w.check()
				w.nothingIsHeld()
				b.compare(w)
				w.closeStore()
				require.False(t, w.dirty())
			}
			t.Logf("rig: %d operations acknowledged, %d records", b.acks, len(b.state))
			require.Greater(t, b.acks, 10)
		})
	}
}
