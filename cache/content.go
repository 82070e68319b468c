package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobStore is the content store with what this manager knows of it.
//
// A blob that a record names is somebody's. One that is being written is not
// yet, and so has an intent on the disk and a pin here; one whose last record
// goes has an intent, too, until its bytes are gone. A pin keeps a blob that
// another record is about to name from being deleted with its last record.
type blobStore struct {
	// Fixed after Open.
	m *Manager
	// dir is the directory of a store of our own; empty if one was handed in.
	dir string
	// collected says that the store that was handed in deletes for itself
	// what nobody has labelled.
	collected bool
	// label is the label that says that this cache uses a blob of a store
	// that was handed in. It is also the beginning of our ingests' names.
	label string
	// seam lets tests stand between the cache and a store of our own.
	seam func(content.Store) content.Store

	// openMu is a leaf, held across the making of our own store, once.
	openMu sync.Mutex
	store  content.Store

	// mu is a leaf.
	mu sync.Mutex
	// Guarded by mu.
	uses      map[digest.Digest]*blobUse
	providers map[digest.Digest]content.Provider
	// skipped says that blobs were not settled because another process was
	// writing some.
	skipped bool
}

// blobUse is what is under way with one blob.
type blobUse struct {
	// pins counts those who are about to name the blob in a record.
	pins int
	// doubt says that the blob may have lost its last record.
	doubt bool
	// leaving is not nil while somebody finds out whether it goes, and is
	// closed when that is done.
	leaving chan struct{}
}

// contentDir is the directory of a cache's own content store.
const contentDir = "content"

func newBlobStore(m *Manager, o *Options) *blobStore {
	b := &blobStore{
		m: m, store: o.Content, collected: o.ContentGC, seam: o.contentSeam,
		uses:      map[digest.Digest]*blobUse{},
		providers: map[digest.Digest]content.Provider{},
	}
	sum := sha256.Sum256([]byte(o.Root))
	b.label = labelPrefix + hex.EncodeToString(sum[:8])
	if o.Content == nil {
		b.dir = filepath.Join(o.Root, contentDir)
	}
	return b
}

// Labels in a content store that was handed in. The first is containerd's: its
// garbage collector keeps what has it. Ours name the cache, by its root, and
// say what of it is ours.
const (
	labelGCRoot = "containerd.io/gc.root"
	labelPrefix = "lamina.build/store."

	// labelWrote: we wrote the blob.
	labelWrote = "wrote"
	// labelRooted: it was there, and the label for the collector is ours.
	labelRooted = "rooted"
	// labelUsed: it was there and kept by somebody else.
	labelUsed = "used"

	// labelUncompressed is where containerd keeps the DiffID of a layer blob.
	labelUncompressed = "containerd.io/uncompressed"
)

// open gives the content store. Our own one is opened with the first call, as
// that writes in its directory.
func (b *blobStore) open() (content.Store, error) {
	b.openMu.Lock()
	defer b.openMu.Unlock()
	if b.store != nil {
		return b.store, nil
	}
	if err := os.Mkdir(b.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the content store: %w", classify(err))
	}
	s, err := local.NewStore(b.dir)
	if err != nil {
		return nil, fmt.Errorf("open the content store: %w", classify(err))
	}
	if b.store = s; b.seam != nil {
		b.store = b.seam(s)
	}
	return b.store, nil
}

// given is the store that was handed in, or nil.
func (b *blobStore) given() content.Store {
	if b.dir != "" {
		return nil
	}
	return b.store // was there from the beginning
}

// path is where our own store has a blob.
func (b *blobStore) path(d digest.Digest) string {
	return filepath.Join(b.dir, "blobs", d.Algorithm().String(), d.Encoded())
}

// size says how large a blob of the store is; ok is false if it is not there.
func (b *blobStore) size(ctx context.Context, d digest.Digest) (size int64, ok bool, err error) {
	if err := d.Validate(); err != nil {
		return 0, false, fmt.Errorf("digest %q: %w: %w", clip(string(d)), err, errdefs.ErrInvalidArgument)
	}
	if s := b.given(); s != nil {
		info, err := s.Info(ctx, d)
		if errdefs.IsNotFound(err) {
			return 0, false, nil
		}
		return info.Size, err == nil, err
	}
	st, err := os.Stat(b.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, classify(err)
	}
	return st.Size(), true, nil
}

// reader opens a blob of the store for reading. It is NotFound if it is not
// there.
func (b *blobStore) reader(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w: %w", clip(string(desc.Digest)), err, errdefs.ErrInvalidArgument)
	}
	if s := b.given(); s != nil {
		return s.ReaderAt(ctx, desc)
	}
	if b.seam != nil {
		s, err := b.open()
		if err != nil {
			return nil, err
		}
		return s.ReaderAt(ctx, desc)
	}
	return local.OpenReader(b.path(desc.Digest))
}

// provide remembers where a blob can be had from.
func (b *blobStore) provide(d digest.Digest, p content.Provider) {
	if p == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.providers[d] = p
}

// provider is where a blob can be had from, or nil.
func (b *blobStore) provider(d digest.Digest) content.Provider {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.providers[d]
}

// claim labels a blob that is in a store that was handed in, so that its
// collector keeps it. A store without labels keeps what it likes.
func (b *blobStore) claim(ctx context.Context, d digest.Digest) error {
	s := b.given()
	if s == nil {
		return nil
	}
	info, err := s.Info(ctx, d)
	if err != nil {
		return err
	}
	if info.Labels[b.label] != "" {
		return nil
	}
	set := map[string]string{b.label: labelUsed}
	if info.Labels[labelGCRoot] == "" {
		set = b.labels(labelRooted)
	}
	return update(ctx, s, d, set)
}

// labels are those of a blob that we keep.
func (b *blobStore) labels(how string) map[string]string {
	return map[string]string{b.label: how, labelGCRoot: b.m.now().UTC().Format(time.RFC3339)}
}

// update sets labels; an empty one is removed.
func update(ctx context.Context, s content.Store, d digest.Digest, set map[string]string) error {
	var fields []string
	for name := range set {
		fields = append(fields, "labels."+name)
	}
	_, err := s.Update(ctx, content.Info{Digest: d, Labels: set}, fields...)
	if errdefs.IsFailedPrecondition(err) || errdefs.IsNotImplemented(err) {
		return nil // it keeps no labels
	}
	return err
}

// delete gives up a blob that no record names any more. Of a store that was
// handed in only what we labelled is touched.
func (b *blobStore) delete(ctx context.Context, d digest.Digest) error {
	given := b.given()
	if given == nil {
		// As containerd's store does it, which is not opened for this: that
		// takes an inode, and a removal has to do without.
		if err := os.Remove(b.path(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return classify(err)
		}
		return nil
	}
	info, err := given.Info(ctx, d)
	if err != nil {
		return ignoreNotFound(err)
	}
	how := info.Labels[b.label]
	if how == "" {
		return nil
	}
	for name := range info.Labels {
		if strings.HasPrefix(name, labelPrefix) && name != b.label {
			// Another cache goes on with it, and what was ours is its now.
			set := map[string]string{b.label: ""}
			if how != labelUsed {
				set[name] = how
			}
			return update(ctx, given, d, set)
		}
	}
	if how == labelWrote && !b.collected {
		return ignoreNotFound(given.Delete(ctx, d))
	}
	set := map[string]string{b.label: ""}
	if how != labelUsed {
		set[labelGCRoot] = ""
	}
	return update(ctx, given, d, set)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
