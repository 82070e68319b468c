package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/migrate/buildkit"
)

// read reads the state of a worker and plans. The state stays open, and the
// old databases locked, until the caller closes it.
func read(ctx context.Context, dir string) (_ *buildkit.State, _ *Plan, err error) {
	s, err := buildkit.Open(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	old, err := ownerless(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	class, err := attributes(ctx, s)
	if err != nil {
		return nil, nil, fmt.Errorf("look for marks of overlayfs: %w", err)
	}
	p, err := NewPlan(s, PlanOptions{
		Ownerless: old, Attributes: class,
		Size: func(dir string) (int64, error) { return diskUsage(ctx, s.DataDir(dir)) },
	})
	s.Forget()
	return s, p, err
}

// ownerless says whether the daemon that worked here last was older than
// v0.11, whose content digests take no account of owners. No file says so. The
// layout tells it of some versions; for the others a stored digest of a file
// that does not belong to root is computed both ways.
func ownerless(ctx context.Context, s *buildkit.State) (bool, error) {
	if s.Version == 1 {
		return true, nil
	}
	rows := make([]*buildkit.Row, 0, len(s.Rows))
	for _, r := range s.List {
		if r.Damaged == nil {
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b *buildkit.Row) int {
		return cmp.Or(b.Created.Compare(a.Created), strings.Compare(a.ID, b.ID))
	})
	for _, r := range rows {
		if r.Index("cache.layerIdentity") != "" || verifiedName(r.Snapshot) {
			return false, nil // v0.34
		}
	}
	if len(rows) > 0 && rows[0].Snapshot == "" {
		return true, nil // up to v0.9 only layers said what their snapshot is
	}
	left := looked
	for _, r := range rows[:min(lookedRows, len(rows))] {
		verdict, err := digestedWithoutOwners(ctx, s, r, &left)
		if err != nil || verdict != unknown {
			return verdict == yes, err
		}
	}
	return false, nil
}

type verdict int

const (
	unknown verdict = iota
	yes
	no
)

// looked bounds how many files are looked at, lookedRows of how many records,
// the newest first: those that do not belong to root are many or none.
const looked, lookedRows = 10_000, 1000

// errStop ends a walk early, and errNotStored says that a tree would have to
// read files to know a digest.
var errStop, errNotStored = errors.New("stop"), errors.New("not stored")

// digestedWithoutOwners compares stored digests of the row with the files.
func digestedWithoutOwners(ctx context.Context, s *buildkit.State, r *buildkit.Row, left *int) (v verdict, err error) {
	values, err := s.External(r.ID)
	if err != nil {
		return unknown, nil // who takes them over says so
	}
	snap := s.Snapshots[r.SnapshotName()]
	if *left < 0 || snap == nil || !snap.Present || len(values[contenthash.V0Key]) == 0 {
		return unknown, nil
	}
	stored, err := contenthash.ImportV0(contenthash.V0{Value: values[contenthash.V0Key]})
	if err != nil {
		return unknown, nil
	}
	dir := s.DataDir(snap.Dir)
	if s.Snapshotter == buildkit.Overlayfs {
		dir = filepath.Join(dir, "fs")
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if *left--; *left < 0 {
			return errStop
		}
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // what cannot be read tells nothing
		}
		if v, err = compareOwners(ctx, stored, dir, path); v != unknown && err == nil {
			return errStop
		}
		return err
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return v, err
}

// compareOwners computes the digest of a file both ways.
func compareOwners(ctx context.Context, stored *contenthash.Tree, dir, path string) (verdict, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return unknown, nil
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid == 0 && st.Gid == 0 {
		return unknown, nil
	}
	name, err := filepath.Rel(dir, path)
	if err != nil {
		return unknown, err
	}
	want, err := stored.Checksum(ctx, func(context.Context) (*contenthash.Root, error) { return nil, errNotStored }, name, contenthash.Options{})
	if err != nil {
		return unknown, ctx.Err()
	}
	for _, v := range []verdict{yes, no} {
		t, err := contenthash.ImportV0(contenthash.V0{IgnoreOwners: v == yes})
		if err != nil {
			return unknown, err
		}
		got, err := t.Checksum(ctx, contenthash.Dir(dir), name, contenthash.Options{})
		if err == nil && got == want {
			return v, nil
		}
	}
	return unknown, ctx.Err()
}

// diskUsage is what a directory occupies, in bytes. A file with several names
// counts once.
func diskUsage(ctx context.Context, dir string) (total int64, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && !seen[st.Ino] {
			seen[st.Ino] = true
			total += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("measure what is left over: %w", err)
	}
	return total, nil
}
