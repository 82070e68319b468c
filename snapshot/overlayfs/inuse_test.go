package overlayfs

import (
	"os"
	"sync"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func requireInUse(t *testing.T, want bool, upper string) {
	t.Helper()
	busy, err := InUse(upper)
	require.NoError(t, err)
	require.Equal(t, want, busy)
}

func TestInUse(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		requireInUse(t, false, s.path("upper"))
		for _, volatile := range []bool{false, true} {
			m := s.writable(s.tree("a", "f"))
			m.UserXattr, m.Volatile = user, volatile
			s.mount(m)
			requireInUse(t, true, s.path("upper"))
			requireInUse(t, true, s.path("upper"))
			requireInUse(t, false, s.path("a"))
			s.unmount()
			requireInUse(t, false, s.path("upper"))
		}
	})
}

func TestInUseInAnotherMountNamespace(t *testing.T) {
	needRoot(t)
	s := newStack(t)
	stop := startHelper(t, "hold", s.tree("a"), s.path("upper"), s.path("work"), s.path("m"))
	require.Zero(t, mounts(t, s.dir), "the mount is not seen from here")
	requireInUse(t, true, s.path("upper"))
	stop()
	requireInUse(t, false, s.path("upper"))
}

func TestInUseLeavesNothing(t *testing.T) {
	needRoot(t)
	s := newStack(t)
	upper := s.tree("upper", "f=1", "d/g=2")
	files, tree, here := openFiles(t), show(t, s.dir), mounts(t, "/")
	for range 5 {
		requireInUse(t, false, upper)
	}
	require.Equal(t, files, openFiles(t))
	require.Equal(t, tree, show(t, s.dir))
	require.Equal(t, here, mounts(t, "/"))
	names, err := sysx.LListxattr(upper)
	require.NoError(t, err)
	require.Empty(t, names)

	s.mount(s.writable(s.tree("a")))
	require.NoError(t, os.WriteFile(s.path("m/after"), nil, 0o644), "a mount after a probe works")
	requireInUse(t, true, upper)
}

func TestInUseOfMissing(t *testing.T) {
	_, err := InUse(t.TempDir() + "/missing")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "missing")
	file := t.TempDir() + "/file"
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	_, err = InUse(file)
	require.Error(t, err)
	require.NotErrorIs(t, err, errdefs.ErrNotFound)
}

// Probes of different directories do not disturb each other.
func TestInUseConcurrently(t *testing.T) {
	needRoot(t)
	var wg sync.WaitGroup
	for range 8 {
		s := newStack(t)
		m := s.writable(s.tree("a"))
		m.Volatile = true
		wg.Go(func() {
			for range 5 {
				busy, err := InUse(m.Upper)
				if err != nil || busy {
					t.Errorf("free: %t %v", busy, err)
				}
				if err := RemoveVolatileMark(m.Work); err != nil {
					t.Error(err)
				}
				if err := m.Mount(s.path("m")); err != nil {
					t.Error(err)
					return
				}
				busy, err = InUse(m.Upper)
				if err != nil || !busy {
					t.Errorf("mounted: %t %v", busy, err)
				}
				s.unmount()
			}
		})
	}
	wg.Wait()
}
