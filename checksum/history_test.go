package checksum_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/snapshot"
)

// TestHistories runs random histories of records: whatever was written,
// reported or not, committed, finalized, reopened, inherited, saved, cut off,
// and restarted, each digest is that of somebody who knows nothing.
func TestHistories(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	for _, k := range kinds[:2] {
		t.Run(k.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				h := newHistory(t, k)
				defer h.end()
				for range rapid.IntRange(3, 14).Draw(t, "steps") {
					h.step()
				}
				h.restart()
				h.compareAll()
			})
		})
	}
}

// history is a store with records that come and go.
type history struct {
	*rapid.T
	ctx    context.Context
	kind   kind
	root   string
	driver snapshot.Driver
	m      *cache.Manager
	sums   *checksum.Keeper
	// ids are the immutable records.
	ids []cache.ID
}

func newHistory(t *rapid.T, k kind) *history {
	root, err := os.MkdirTemp("/dev/shm", "checksum-")
	if err != nil {
		root, err = os.MkdirTemp("", "checksum-")
	}
	require.NoError(t, err)
	h := &history{T: t, ctx: context.Background(), kind: k, root: root}
	h.open()
	return h
}

func (h *history) open() {
	var err error
	h.driver, err = h.kind.open(h.root)
	require.NoError(h, err)
	h.m, err = cache.Open(h.ctx, cache.Options{
		Root: h.root, Driver: h.driver, BootID: "this boot", SyncInterval: -1, Unconfirm: contenthash.UnconfirmStored,
	})
	require.NoError(h, err)
	h.sums = checksum.New(h.m, checksum.Options{Trees: 2})
}

func (h *history) close() error {
	return errors.Join(h.sums.Close(), h.m.Close(), h.driver.Close())
}

func (h *history) end() {
	err := errors.Join(h.close(), os.RemoveAll(h.root))
	if !h.Failed() {
		require.NoError(h, err)
	}
}

func (h *history) restart() {
	require.NoError(h, h.close())
	h.open()
}

// pick is one of the records; none if there are none.
func (h *history) pick() (cache.ID, bool) {
	if len(h.ids) == 0 {
		return "", false
	}
	return rapid.SampledFrom(h.ids).Draw(h.T, "record"), true
}

func (h *history) yes(what string) bool { return rapid.Bool().Draw(h.T, what) }

func (h *history) step() {
	switch op := rapid.SampledFrom([]string{"base", "child", "child", "reopen", "reopen", "finalize", "ask", "ask", "flush", "restart"}).Draw(h.T, "op"); op {
	case "base":
		h.write(nil)
	case "child":
		if id, ok := h.pick(); ok {
			parent, err := h.m.Get(h.ctx, id, cache.GetOptions{})
			require.NoError(h, err)
			defer func() { require.NoError(h, parent.Release(h.ctx)) }()
			h.write(parent)
		}
	case "reopen":
		h.reopen()
	case "finalize":
		if id, ok := h.pick(); ok {
			h.with(id, func(ref *cache.ImmutableRef) { require.NoError(h, ref.Finalize(h.ctx)) })
		}
	case "ask":
		if id, ok := h.pick(); ok {
			h.compare(id, rapid.SampledFrom([]string{"/", "a", "a/b", "b", "link", "a/link/x"}).Draw(h.T, "path"))
		}
	case "flush":
		require.NoError(h, h.sums.Flush(h.ctx))
	case "restart":
		h.restart()
	}
}

func (h *history) with(id cache.ID, use func(*cache.ImmutableRef)) {
	ref, err := h.m.Get(h.ctx, id, cache.GetOptions{})
	require.NoError(h, err)
	defer func() { require.NoError(h, ref.Release(h.ctx)) }()
	use(ref)
}

// compare asks the keeper and one who knows nothing.
func (h *history) compare(id cache.ID, path string) {
	h.with(id, func(ref *cache.ImmutableRef) {
		o := contenthash.Options{FollowLinks: true}
		want, wantErr := contenthash.New().Checksum(h.ctx, checksum.Files(ref), path, o)
		got, err := h.sums.Checksum(h.ctx, ref, path, o)
		require.Equal(h, wantErr == nil, err == nil, "%v, want %v", err, wantErr)
		require.Equal(h, want, got, "%s of %s", path, id)
	})
}

func (h *history) compareAll() {
	for _, id := range h.ids {
		h.compare(id, "/")
	}
}

// write makes a record over parent.
func (h *history) write(parent *cache.ImmutableRef) {
	var mut *cache.MutableRef
	var w *checksum.Writer
	var err error
	if h.yes("writer") {
		mut, w, err = h.sums.New(h.ctx, parent, cache.NewOptions{Retain: h.yes("retain")})
	} else {
		mut, err = h.m.New(h.ctx, parent, cache.NewOptions{})
	}
	require.NoError(h, err)
	h.finish(mut, w)
}

// reopen writes to a record that is there, if that can be.
func (h *history) reopen() {
	id, ok := h.pick()
	if !ok {
		return
	}
	var mut *cache.MutableRef
	var w *checksum.Writer
	var err error
	if h.yes("writer") {
		mut, w, err = h.sums.Reopen(h.ctx, id, cache.ReopenOptions{})
	} else {
		mut, err = h.m.GetMutable(h.ctx, id)
	}
	if err != nil {
		require.ErrorContains(h, err, "make a new record with it as parent")
		return
	}
	h.forget(id)
	if h.yes("cut off") {
		// Changes that nobody tells, and then another holder.
		h.change(mut, nil)
		id := mut.ID()
		require.NoError(h, mut.Release(h.ctx))
		if h.yes("restart") {
			h.restart()
		}
		if h.yes("writer") {
			mut, w, err = h.sums.Reopen(h.ctx, id, cache.ReopenOptions{})
		} else {
			w = nil
			mut, err = h.m.GetMutable(h.ctx, id)
		}
		require.NoError(h, err)
	}
	h.finish(mut, w)
}

func (h *history) forget(id cache.ID) {
	for i, o := range h.ids {
		if o == id {
			h.ids = append(h.ids[:i:i], h.ids[i+1:]...)
			return
		}
	}
}

// finish writes, asks in between, and commits.
func (h *history) finish(mut *cache.MutableRef, w *checksum.Writer) {
	for range rapid.IntRange(0, 3).Draw(h.T, "rounds") {
		told := w
		if w != nil && h.yes("silently") {
			told = nil
			w.Unreported()
		}
		h.change(mut, told)
		if w != nil && h.yes("ask") {
			got, err := w.Checksum(h.ctx, "/", contenthash.Options{})
			require.NoError(h, err)
			mnt, err := mut.Mount(h.ctx, cache.MountOptions{ReadOnly: true})
			require.NoError(h, err)
			want, err := contenthash.New().Checksum(h.ctx, contenthash.Dir(mnt.Path()), "/", contenthash.Options{})
			require.NoError(h, errors.Join(err, mnt.Unmount()))
			require.Equal(h, want, got)
		}
	}
	var imm *cache.ImmutableRef
	var err error
	if w != nil && !h.yes("commit without the writer") {
		imm, err = w.Commit(h.ctx, cache.CommitOptions{})
	} else {
		imm, err = mut.Commit(h.ctx)
	}
	require.NoError(h, err)
	h.ids = append(h.ids, imm.ID())
	require.NoError(h, imm.Release(h.ctx))
}

// change changes a few files, and reports them to w if there is one.
func (h *history) change(mut *cache.MutableRef, w *checksum.Writer) {
	mnt, err := mut.Mount(h.ctx, cache.MountOptions{})
	require.NoError(h, err)
	defer func() { require.NoError(h, mnt.Unmount()) }()
	for range rapid.IntRange(1, 4).Draw(h.T, "changes") {
		path := rapid.SampledFrom([]string{"a", "b", "a/b", "a/c", "a/b/d", "link", "b/x"}).Draw(h.T, "path")
		what := rapid.SampledFrom([]string{"file", "file", "dir", "remove", "link", "chmod", "hardlink"}).Draw(h.T, "change")
		for _, c := range h.changeOne(mnt.Path(), path, what) {
			if w != nil {
				require.NoError(h, w.HandleChange(c))
			}
		}
	}
}

// changeOne makes one change, if it can be made, and says what changed.
func (h *history) changeOne(dir, path, what string) []contenthash.Change {
	at := filepath.Join(dir, path)
	for dirs := filepath.Dir(path); dirs != "."; dirs = filepath.Dir(dirs) {
		// No link on the way: it might lead out of the mount.
		if st, err := os.Lstat(filepath.Join(dir, dirs)); err != nil || !st.IsDir() {
			return nil
		}
	}
	st, err := os.Lstat(at)
	there := err == nil
	isDir := there && st.IsDir()
	gone := contenthash.Change{Kind: contenthash.Delete, Path: path}
	now := func(mode fs.FileMode) contenthash.Change {
		return contenthash.Change{Kind: contenthash.Modify, Path: path, Mode: mode}
	}
	switch what {
	case "file":
		if there && !st.Mode().IsRegular() {
			require.NoError(h, os.RemoveAll(at))
		}
		// Of one size, so that the stat data hardly tell.
		text := fmt.Sprint(rapid.IntRange(0, 9).Draw(h.T, "text"))
		require.NoError(h, os.WriteFile(at, []byte(text), 0o644))
		changes := []contenthash.Change{now(0)}
		return append(changes, h.twins(dir, path)...)
	case "dir":
		if isDir {
			return nil
		}
		require.NoError(h, os.RemoveAll(at))
		require.NoError(h, os.Mkdir(at, 0o755))
		return []contenthash.Change{gone, now(fs.ModeDir)}
	case "remove":
		require.NoError(h, os.RemoveAll(at))
		return []contenthash.Change{gone}
	case "link":
		require.NoError(h, os.RemoveAll(at))
		require.NoError(h, os.Symlink(rapid.SampledFrom([]string{"a", "/b", "../a/c"}).Draw(h.T, "target"), at))
		return []contenthash.Change{gone, now(fs.ModeSymlink)}
	case "chmod":
		if !there || st.Mode()&fs.ModeSymlink != 0 {
			return nil
		}
		require.NoError(h, os.Chmod(at, st.Mode().Perm()^0o011))
		return append([]contenthash.Change{now(st.Mode())}, h.twins(dir, path)...)
	default: // hardlink
		from := filepath.Join(dir, "b")
		if st, err := os.Lstat(from); err != nil || !st.Mode().IsRegular() || path == "b" {
			return nil
		}
		require.NoError(h, os.RemoveAll(at))
		require.NoError(h, os.Link(from, at))
		return []contenthash.Change{gone, now(0)}
	}
}

// twins are the other names of a file: of each a change has to be reported.
func (h *history) twins(dir, path string) (out []contenthash.Change) {
	st, err := os.Lstat(filepath.Join(dir, path))
	require.NoError(h, err)
	if st.IsDir() {
		return nil
	}
	require.NoError(h, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		o, err := d.Info()
		if err == nil && os.SameFile(st, o) {
			rel, _ := filepath.Rel(dir, p)
			out = append(out, contenthash.Change{Kind: contenthash.Modify, Path: rel, Mode: o.Mode()})
		}
		return err
	}))
	return out
}
