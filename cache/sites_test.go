package cache_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// wrong is what goes wrong at a site.
type wrong string

const (
	failsEIO    wrong = "EIO"
	failsENOSPC wrong = "ENOSPC"
	failsEPERM  wrong = "EPERM"
	// isShort lets a read or a write of content end early. Elsewhere nothing
	// can be short, and EIO stands in.
	isShort wrong = "short"
	// isCancelled ends the context of the operation that comes there.
	isCancelled wrong = "cancelled"
	// isSlow holds the operation up there until others have been at work.
	isSlow wrong = "slow"
)

var wrongs = []wrong{failsEIO, isSlow, isShort, failsENOSPC, isCancelled, failsEPERM}

var errnos = map[wrong]syscall.Errno{failsEIO: syscall.EIO, failsENOSPC: syscall.ENOSPC, failsEPERM: syscall.EPERM, isShort: syscall.EIO}

// sites are all the places where something outside of the cache answers: each
// durable step of the store, the drivers and the cache; each call of the
// driver, and its reply; the figures of the disk; each read of a layer that
// comes from elsewhere; each call of a content store, and each read and write
// of a blob there. They are counted, and the one with number at goes wrong.
type sites struct {
	mu sync.Mutex
	// Guarded by mu.
	on     bool
	n, at  int
	wrong  wrong
	cancel context.CancelFunc
	hit    string
	kinds  map[string]int
	// probe does unrelated work, while something is slow.
	probe func(site string) error
	// probed is what came of it.
	probed error
}

// errShort says to whoever reads or writes content that it ends here.
var errShort = errors.New("short")

// meet counts a site, and says how it fails.
func (s *sites) meet(kind, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.on {
		return nil
	}
	s.n++
	s.kinds[kind]++
	if s.n != s.at {
		return nil
	}
	s.hit = kind + " " + name
	switch s.wrong {
	case isCancelled:
		s.cancel()
		return nil
	case isSlow:
		s.on = false
		s.mu.Unlock()
		err := s.probe(s.hit)
		s.mu.Lock()
		s.on, s.probed = true, err
		return nil
	case isShort:
		if kind == "read" || kind == "write" {
			return errShort
		}
	}
	return &os.PathError{Op: name, Path: kind, Err: errnos[s.wrong]}
}

func (s *sites) step(name string) error { return s.meet("step", name) }

// faulty is the driver with its calls and replies as sites. A driver's Close is
// none: nobody could call it again.
func (s *sites) faulty(k kind, root string) (*snapshottest.Faulty, error) {
	d, err := openStepped(k.name, s.step)(root)
	if err != nil {
		return nil, err
	}
	f := snapshottest.NewFaulty(d)
	meet := func(kind string) func(snapshottest.Call) error {
		return func(c snapshottest.Call) error {
			if c.Op == "Close" {
				return nil
			}
			return s.meet(kind, c.Op)
		}
	}
	f.Hook(meet("call"), meet("reply"))
	return f, nil
}

func (s *sites) disk() (policy.Disk, error) {
	return policy.Disk{Total: 1 << 40, Free: 1 << 39}, s.meet("statfs", "statfs")
}

// sitesProvider is a provider whose reads are sites.
type sitesProvider struct {
	s *sites
	content.Provider
}

// ReaderAt implements content.Provider.
func (p sitesProvider) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	if err := p.s.meet("fetch", "open"); err != nil {
		return nil, err
	}
	ra, err := p.Provider.ReaderAt(ctx, d)
	if err != nil {
		return nil, err
	}
	return sitesReader{ra, p.s}, nil
}

type sitesReader struct {
	content.ReaderAt
	s *sites
}

func (r sitesReader) ReadAt(p []byte, at int64) (int, error) {
	err := r.s.meet("read", "blob")
	if errors.Is(err, errShort) {
		n, _ := r.ReaderAt.ReadAt(p[:min(len(p), 7)], at)
		return n, io.ErrUnexpectedEOF
	}
	if err != nil {
		return 0, err
	}
	return r.ReaderAt.ReadAt(p, at)
}

// sitesStore is a content store whose calls are sites.
type sitesStore struct {
	content.Store
	s *sites
}

func (c sitesStore) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if err := c.s.meet("content", "Info"); err != nil {
		return content.Info{}, err
	}
	return c.Store.Info(ctx, d)
}

func (c sitesStore) Update(ctx context.Context, info content.Info, fields ...string) (content.Info, error) {
	if err := c.s.meet("content", "Update"); err != nil {
		return content.Info{}, err
	}
	return c.Store.Update(ctx, info, fields...)
}

func (c sitesStore) Delete(ctx context.Context, d digest.Digest) error {
	if err := c.s.meet("content", "Delete"); err != nil {
		return err
	}
	return c.Store.Delete(ctx, d)
}

func (c sitesStore) ReaderAt(ctx context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	return sitesProvider{c.s, c.Store}.ReaderAt(ctx, d)
}

func (c sitesStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	if err := c.s.meet("content", "Writer"); err != nil {
		return nil, err
	}
	w, err := c.Store.Writer(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return sitesWriter{w, c.s}, nil
}

type sitesWriter struct {
	content.Writer
	s *sites
}

func (w sitesWriter) Write(p []byte) (int, error) {
	err := w.s.meet("write", "blob")
	if errors.Is(err, errShort) {
		n, err := w.Writer.Write(p[:len(p)/2])
		return n, errors.Join(err, io.ErrShortWrite)
	}
	if err != nil {
		return 0, err
	}
	return w.Writer.Write(p)
}

func (w sitesWriter) Commit(ctx context.Context, size int64, want digest.Digest, opts ...content.Opt) error {
	if err := w.s.meet("content", "Commit"); err != nil {
		return err
	}
	if err := w.Writer.Commit(ctx, size, want, opts...); err != nil {
		return err
	}
	return w.s.meet("content", "Commit's reply")
}

// sharedContent is a content store that the cache is handed.
func sharedContent(t testing.TB, dir string) content.Store {
	s, err := local.NewLabeledStore(dir, &labels{of: map[digest.Digest]map[string]string{}})
	require.NoError(t, err)
	return s
}

// works does what touches no record that the operation is about: looking, and
// the whole life of another record, but for what has to wait where the only
// transaction that can write, or the mark of a dirty store, is what is slow.
func works(ctx context.Context, m *cache.Manager, id cache.ID, site string) error {
	if _, err := m.Search(ctx, "nothing"); err != nil {
		return err
	}
	if _, err := m.Totals(ctx); err != nil {
		return err
	}
	if _, err := m.Children(ctx, id); err != nil {
		return err
	}
	m.Refs(id)
	for _, serial := range []string{"step tx ", "step mark ", "step compact "} {
		if strings.HasPrefix(site, serial) {
			return nil
		}
	}
	mut, err := m.New(ctx, nil, cache.NewOptions{Retain: true})
	if err != nil {
		return err
	}
	if err := mut.SetValue(ctx, cache.Value{Name: "probe", Index: "probe"}); err != nil {
		return err
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(imm.Finalize(ctx), imm.Release(ctx)); err != nil {
		return err
	}
	out, err := m.Remove(ctx, imm.ID())
	if err == nil {
		err = out[0].Err
	}
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}
