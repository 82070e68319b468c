package checksum

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
)

// Options of a Keeper. The zero value is fine.
type Options struct {
	// Trees is how many trees stay in memory; DefaultTrees if zero. Those in
	// use and those that wait to be saved stay in any case.
	Trees int
	// Logger hears of stored trees that are damaged and of what could not be
	// saved. Nil is silence.
	Logger *slog.Logger
}

// DefaultTrees is as many as the sources of the builds that run at one time,
// in memory some 150 bytes for each of their files.
const DefaultTrees = 20

// Keeper computes the content hashes of a cache's records and keeps them. All
// methods are safe for concurrent use. Of those who ask for the same record one
// reads files at a time and the others find what it read; each waits with its
// own context, and whoever gives up leaves what was read to the next.
type Keeper struct {
	// Fixed.
	m    *cache.Manager
	log  *slog.Logger
	most int
	kick chan struct{} // has room for one: something waits to be saved
	stop chan struct{}
	done chan struct{} // closed when the background has ended

	mu sync.Mutex
	// Guarded by mu, which is never held across I/O.
	slots  map[cache.ID]*slot
	clock  uint64 // counts uses
	closed bool
}

// slot is the place of one record's tree.
type slot struct {
	// Fixed.
	id cache.ID
	// loading is held by the one who loads the tree, or takes it away.
	loading chan struct{}

	// Guarded by Keeper.mu.
	tree   *Tree
	users  int
	unsafe bool // it has learned what is not saved
	used   uint64
}

// New makes a Keeper of the records of m, which should be open with
// contenthash.UnconfirmStored as Options.Unconfirm: without it a reopen drops
// what is stored. Close it before m.
func New(m *cache.Manager, o Options) *Keeper {
	k := &Keeper{
		m: m, log: o.Logger, most: o.Trees,
		kick: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
		slots: map[cache.ID]*slot{},
	}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	if k.most <= 0 {
		k.most = DefaultTrees
	}
	go k.background()
	return k
}

// Checksum is the digest of a path in the record's tree: see
// contenthash.Tree.Checksum. It mounts the record only if files have to be
// read, and what it learns is saved in the background.
func (k *Keeper) Checksum(ctx context.Context, ref *cache.ImmutableRef, path string, o contenthash.Options) (digest.Digest, error) {
	s := k.take(ref.ID())
	defer k.give(s)
	d, err := k.checksum(ctx, s, ref, path, o)
	if err != nil {
		return "", fmt.Errorf("checksum of record %s: %w", ref.ID(), err)
	}
	return d, nil
}

func (k *Keeper) checksum(ctx context.Context, s *slot, ref *cache.ImmutableRef, path string, o contenthash.Options) (digest.Digest, error) {
	tree, err := k.tree(ctx, s, ref)
	if err != nil {
		return "", err
	}
	return tree.Checksum(ctx, k.files(s, ref), path, o)
}

// files is Files, and notes that there will be something to save.
func (k *Keeper) files(s *slot, ref *cache.ImmutableRef) contenthash.Opener {
	return func(ctx context.Context) (*contenthash.Root, error) {
		root, err := Files(ref)(ctx)
		if err != nil {
			return nil, err
		}
		return root.OnClose(func() { k.learned(s) }), nil
	}
}

// Compare yields the paths at which two records differ: see
// contenthash.Compare. The handles must stay until it ends.
func (k *Keeper) Compare(ctx context.Context, first, second *cache.ImmutableRef) iter.Seq2[contenthash.Difference, error] {
	return func(yield func(contenthash.Difference, error) bool) {
		var sides [2]contenthash.Side
		for i, ref := range []*cache.ImmutableRef{first, second} {
			s := k.take(ref.ID())
			defer k.give(s)
			tree, err := k.tree(ctx, s, ref)
			if err != nil {
				yield(contenthash.Difference{}, fmt.Errorf("compare record %s: %w", ref.ID(), err))
				return
			}
			sides[i] = contenthash.Side{Tree: tree.Tree, Open: k.files(s, ref)}
		}
		for d, err := range contenthash.Compare(ctx, sides[0], sides[1]) {
			if !yield(d, err) {
				return
			}
		}
	}
}

// take finds or makes the place of a record's tree and keeps it.
func (k *Keeper) take(id cache.ID) *slot {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.slots[id]
	if s == nil {
		s = &slot{id: id, loading: make(chan struct{}, 1)}
		k.slots[id] = s
	}
	s.users++
	k.clock++
	s.used = k.clock
	return s
}

// give ends a take.
func (k *Keeper) give(s *slot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.users--
	if s.tree == nil && s.users == 0 {
		k.dropLocked(s)
	}
	k.trimLocked()
}

func (k *Keeper) dropLocked(s *slot) {
	if k.slots[s.id] == s {
		delete(k.slots, s.id)
	}
}

// trimLocked forgets the trees that were not used for longest.
func (k *Keeper) trimLocked() {
	for len(k.slots) > k.most {
		var oldest *slot
		for _, s := range k.slots {
			if s.users == 0 && !s.unsafe && (oldest == nil || s.used < oldest.used) {
				oldest = s
			}
		}
		if oldest == nil {
			return
		}
		k.dropLocked(oldest)
	}
}

// tree gives the tree of s. The first who asks loads it; if that one gives up,
// the next does.
func (k *Keeper) tree(ctx context.Context, s *slot, ref *cache.ImmutableRef) (*Tree, error) {
	if t := k.loaded(s); t != nil {
		return t, nil
	}
	select {
	case s.loading <- struct{}{}:
		defer func() { <-s.loading }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if t := k.loaded(s); t != nil {
		return t, nil
	}
	t, err := load(ctx, k.m, ref, k.inMemory)
	if err != nil {
		return nil, err
	}
	if t.Damage != nil {
		k.log.Warn("stored content hashes are damaged; they are computed anew", "record", string(s.id), "error", t.Damage)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s.tree = t
	return t, nil
}

func (k *Keeper) loaded(s *slot) *Tree {
	k.mu.Lock()
	defer k.mu.Unlock()
	return s.tree
}

// inMemory is the tree of a record if it is in memory.
func (k *Keeper) inMemory(id cache.ID) *contenthash.Tree {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s := k.slots[id]; s != nil && s.tree != nil {
		return s.tree.Tree
	}
	return nil
}

// learned has the tree of s saved in the background.
func (k *Keeper) learned(s *slot) {
	k.mu.Lock()
	s.unsafe = !k.closed
	k.mu.Unlock()
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

func (k *Keeper) background() {
	defer close(k.done)
	for {
		select {
		case <-k.kick:
			k.saveLearned()
		case <-k.stop:
			return
		}
	}
}

// saveLearned saves the trees that have learned something.
func (k *Keeper) saveLearned() {
	for {
		k.mu.Lock()
		var s *slot
		for _, o := range k.slots {
			if o.unsafe && (s == nil || o.used < s.used) {
				s = o
			}
		}
		if s == nil {
			k.trimLocked()
			k.mu.Unlock()
			return
		}
		s.unsafe = false // what it learns from now on counts anew
		s.users++
		t := s.tree
		k.mu.Unlock()
		if err := k.save(context.Background(), t); err != nil {
			k.log.Warn("content hashes could not be saved; they are computed again after a restart", "record", string(s.id), "error", err)
		}
		k.give(s)
	}
}

// save stores a tree. A record that has moved on, to the trash or to a writer,
// needs no hashes, and a cache that is read-only or closed takes none.
func (k *Keeper) save(ctx context.Context, t *Tree) error {
	err := t.Save(ctx, k.m)
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrFailedPrecondition) {
		return nil
	}
	return err
}

// Flush saves what was learned so far, and returns when it is stored.
func (k *Keeper) Flush(ctx context.Context) error {
	var trees []*Tree
	k.mu.Lock()
	for _, s := range k.slots {
		if s.tree != nil {
			trees = append(trees, s.tree)
		}
	}
	k.mu.Unlock()
	var errs []error
	for _, t := range trees {
		errs = append(errs, k.save(ctx, t))
	}
	return errors.Join(errs...)
}

// Close saves what was learned and ends the background. Closing twice is
// harmless. A Keeper that is closed answers as before, and saves nothing more.
func (k *Keeper) Close() error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return nil
	}
	k.closed = true
	k.mu.Unlock()
	close(k.stop)
	<-k.done
	return k.Flush(context.Background())
}

// Stats counts what the tree of a record did since it is in memory; it is the
// zero Stats if it is not.
func (k *Keeper) Stats(id cache.ID) contenthash.Stats {
	if t := k.inMemory(id); t != nil {
		return t.Stats()
	}
	return contenthash.Stats{}
}
