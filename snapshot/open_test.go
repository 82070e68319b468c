package snapshot_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// trial answers like overlayfs.Try and counts how often it was asked.
type trial struct {
	asked []overlayfs.TryOptions
	found overlayfs.Support
	err   error
}

func (r *trial) try(_ context.Context, dir string, o overlayfs.TryOptions) (overlayfs.Support, error) {
	if _, err := os.Stat(dir); err != nil {
		return overlayfs.Support{}, err
	}
	r.asked = append(r.asked, o)
	return r.found, r.err
}

func works() overlayfs.Support {
	return overlayfs.Support{OK: true, MaxLayers: 500, Features: map[string]bool{"volatile": true}}
}

func TestDriverIsChosen(t *testing.T) {
	refused := overlayfs.Support{Reason: "no such device"}
	broken := errors.New("disk full")
	for name, tc := range map[string]struct {
		asked   string
		trial   trial
		want    string
		reason  string
		class   error
		attempt int
	}{
		"it works":                 {"", trial{found: works()}, snapshot.Overlay, "can be mounted", nil, 1},
		"it does not":              {"", trial{found: refused}, snapshot.Native, "no such device", nil, 3},
		"no trial can be made":     {"", trial{err: broken}, "", "", broken, 1},
		"overlay, works":           {snapshot.Overlay, trial{found: works()}, snapshot.Overlay, "asked for", nil, 1},
		"overlay, does not":        {snapshot.Overlay, trial{found: refused}, "", "", errdefs.ErrNotImplemented, 3},
		"native":                   {snapshot.Native, trial{err: broken}, snapshot.Native, "asked for", nil, 0},
		"a name that is no driver": {"zfs", trial{}, "", "", errdefs.ErrInvalidArgument, 0},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			d, err := snapshot.Open(t.Context(), root, snapshot.Options{Driver: tc.asked, Trial: tc.trial.try})
			require.Len(t, tc.trial.asked, tc.attempt)
			if tc.class != nil {
				require.ErrorIs(t, err, tc.class)
				// Nothing is decided: another choice is free.
				d, err := snapshot.Open(t.Context(), root, snapshot.Options{Driver: snapshot.Native})
				require.NoError(t, err)
				require.NoError(t, d.Close())
				return
			}
			require.NoError(t, err)
			defer d.Close()
			require.Equal(t, tc.want, d.Info().Name)
			require.Contains(t, d.Info().Reason, tc.reason)
		})
	}
}

// An existing tree keeps its driver and its attributes, and is opened without
// a trial.
func TestChoiceIsKept(t *testing.T) {
	root := t.TempDir()
	r := &trial{found: works()}
	open := func(o snapshot.Options) (snapshot.Driver, error) {
		o.Trial = r.try
		d, err := snapshot.Open(t.Context(), root, o)
		if err == nil {
			t.Cleanup(func() { require.NoError(t, d.Close()) })
		}
		return d, err
	}
	made, err := open(snapshot.Options{Attributes: snapshot.User})
	require.NoError(t, err)
	require.Equal(t, []overlayfs.TryOptions{{UserXattr: true}}, r.asked)
	require.Equal(t, snapshot.User, made.Info().Attributes)
	r.found = overlayfs.Support{Reason: "gone"}
	for _, o := range []snapshot.Options{{}, {Driver: snapshot.Overlay}, {Attributes: snapshot.User}} {
		d, err := open(o)
		require.NoError(t, err)
		require.Equal(t, made.Info(), d.Info())
	}
	require.Len(t, r.asked, 1)
	for _, o := range []snapshot.Options{{Driver: snapshot.Native}, {Attributes: snapshot.Trusted}} {
		_, err := open(o)
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	}
	_, err = open(snapshot.Options{Attributes: "both"})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

// On another kernel the trial is made again; where it fails the tree can
// still be looked at, and Info says what is the matter.
func TestAnotherKernel(t *testing.T) {
	root := t.TempDir()
	r := &trial{found: works()}
	d, err := snapshot.Open(t.Context(), root, snapshot.Options{Trial: r.try})
	require.NoError(t, err)
	require.NoError(t, d.Close())
	path := filepath.Join(root, "snapshots", "driver")
	older := []byte(`{"driver": "overlay", "attributes": "trusted", "reason": "asked for", "kernel": "4.4", "max_depth": 100}`)
	require.NoError(t, os.WriteFile(path, older, 0o600))

	r.found = overlayfs.Support{Reason: "no such device"}
	d, err = snapshot.Open(t.Context(), root, snapshot.Options{Trial: r.try})
	require.NoError(t, err)
	require.Equal(t, 100, d.Info().MaxDepth)
	require.Contains(t, d.Info().Reason, "no such device")
	_, err = d.Stat(t.Context(), "none")
	require.True(t, errdefs.IsNotFound(err))
	require.NoError(t, d.Close())

	r.found = works()
	for range 2 {
		d, err = snapshot.Open(t.Context(), root, snapshot.Options{Trial: r.try})
		require.NoError(t, err)
		require.Equal(t, 500, d.Info().MaxDepth)
		require.Equal(t, "asked for", d.Info().Reason)
		require.NoError(t, d.Close())
	}
	require.Len(t, r.asked, 1+3+1, "not again on the same kernel")

	require.NoError(t, os.WriteFile(path, []byte("{"), 0o600))
	_, err = snapshot.Open(t.Context(), root, snapshot.Options{Trial: r.try})
	require.True(t, errdefs.IsDataLoss(err), "%v", err)
}

func TestOpenRefusals(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	_, err := snapshot.Open(t.Context(), file, snapshot.Options{Driver: snapshot.Native})
	require.ErrorContains(t, err, file)

	root := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(root, "snapshots"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "snapshots", "active"), nil, 0o644))
	_, err = snapshot.Open(t.Context(), root, snapshot.Options{Driver: snapshot.Native})
	require.ErrorContains(t, err, "active")
}

// Opening an existing tree writes nothing and looks at no snapshot.
func TestOpenIsConstant(t *testing.T) {
	root := t.TempDir()
	d := openWith(t, snapshot.Native, root, &steps{})
	chain(t, d, root, 20)
	var names []string
	again := openWith(t, snapshot.Native, root, &steps{at: func(_ int, name string) error {
		names = append(names, name)
		return nil
	}})
	require.Empty(t, names)
	require.Equal(t, d.Info(), again.Info())
	// Not even damage in the snapshots is noticed.
	require.NoError(t, os.RemoveAll(filepath.Join(root, "snapshots", "committed", "l7")))
	openWith(t, "", root, &steps{})
}

func TestClock(t *testing.T) {
	now := time.Date(2001, 2, 3, 4, 5, 6, 7, time.UTC)
	d, err := snapshot.Open(t.Context(), t.TempDir(), snapshot.Options{
		Driver: snapshot.Native, Now: func() time.Time { return now },
	})
	require.NoError(t, err)
	defer d.Close()
	_, err = d.Prepare(t.Context(), "k", "")
	require.NoError(t, err)
	made := now
	now = now.Add(time.Hour)
	info, err := d.Update(t.Context(), snapshots.Info{Name: "k"})
	require.NoError(t, err)
	require.Equal(t, made, info.Created)
	require.Equal(t, now, info.Updated)
	now = now.Add(time.Hour)
	require.NoError(t, d.Commit(t.Context(), "n", "k"))
	info, err = d.Stat(t.Context(), "n")
	require.NoError(t, err)
	require.Equal(t, now, info.Created)
	require.Equal(t, now, info.Updated)
}

func TestClosed(t *testing.T) {
	d, err := snapshot.Open(t.Context(), t.TempDir(), snapshot.Options{Driver: snapshot.Native})
	require.NoError(t, err)
	require.NoError(t, d.Sync(t.Context()))
	require.NoError(t, d.Close())
	require.NoError(t, d.Close())
	require.True(t, errdefs.IsFailedPrecondition(d.Sync(t.Context())))
}
