package source

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

var sample = []string{
	"README=read me", "cmd/main.go=package main", "cmd/sub/x.go=package sub", "empty/",
	"lib.so->lib.so.1", "lib.so.1=elf", "abs->/etc/passwd", "up->../../outside", "a-b=1", "a/b=2", "a.c=3",
	"pipe|", "one=same", "cmd/two=>one", "cmd/sub/three=>one", "zero=",
}

func TestFirstSyncIsExact(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, sample...)
	require.NoError(t, os.Chmod(filepath.Join(src, "README"), 0o600))
	require.NoError(t, os.Chmod(filepath.Join(src, "a.c"), 0o755|os.ModeSetuid))
	require.NoError(t, os.Chmod(filepath.Join(src, "empty"), 0o777|os.ModeSticky|os.ModeSetgid))
	require.NoError(t, os.Chmod(filepath.Join(src, "cmd/sub"), 0o555))
	t.Cleanup(func() { _ = os.Chmod(src+"/cmd/sub", 0o755); _ = os.Chmod(dst+"/cmd/sub", 0o755) })
	age(t, src)
	write(t, filepath.Join(dst, "build/out.o"), "built")
	write(t, filepath.Join(dst, "cmd/main.o"), "built")

	r := syncDirs(t, src, dst, nil)
	requireSynced(t, src, dst, "build", "build/out.o", "cmd/main.o")
	require.Equal(t, len(look(t, src)), r.Changed)
	require.Zero(t, r.Removed)
	require.Empty(t, r.Notes)
	require.EqualValues(t, len("read me"+"package main"+"package sub"+"elf"+"1"+"2"+"3"+"same"), r.Bytes)

	again := syncDirs(t, src, dst, r.Tree)
	require.Zero(t, again.Changed)
	require.Zero(t, again.Removed)
	require.Zero(t, again.Bytes)
	requireSynced(t, src, dst, "build", "build/out.o", "cmd/main.o")
}

// Each case edits the source, the workspace or both between two syncs.
func TestSecondSync(t *testing.T) {
	type dirs struct{ src, dst string }
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	tests := map[string]struct {
		edit             func(d dirs)
		changed, removed int
		foreign          []string
	}{
		"nothing": {edit: func(dirs) {}},
		"content": {
			edit:    func(d dirs) { must(os.WriteFile(d.src+"/README", []byte("read me!"), 0o644)) },
			changed: 1,
		},
		"content of a linked file": {
			edit:    func(d dirs) { must(os.WriteFile(d.src+"/one", []byte("other"), 0o644)) },
			changed: 3,
		},
		"mode only": {
			edit:    func(d dirs) { must(os.Chmod(d.src+"/README", 0o400)) },
			changed: 1,
		},
		"mode of a directory": {
			edit:    func(d dirs) { must(os.Chmod(d.src+"/cmd", 0o700)) },
			changed: 1,
		},
		"touched": {
			edit:    func(d dirs) { must(os.Chtimes(d.src+"/README", time.Unix(5, 5), time.Unix(5, 5))) },
			changed: 1,
		},
		"same size, time set back": {
			edit: func(d dirs) {
				var st unix.Stat_t
				must(unix.Stat(d.src+"/README", &st))
				must(os.WriteFile(d.src+"/README", []byte("READ ME"), 0o644))
				must(os.Chtimes(d.src+"/README", time.Time{}, time.Unix(st.Mtim.Unix())))
			},
			changed: 1,
		},
		"replaced by one of the same size and time": {
			edit: func(d dirs) {
				var st unix.Stat_t
				must(unix.Stat(d.src+"/README", &st))
				must(os.WriteFile(d.src+"/new", []byte("READ ME"), 0o644))
				must(os.Chtimes(d.src+"/new", time.Time{}, time.Unix(st.Mtim.Unix())))
				must(os.Rename(d.src+"/new", d.src+"/README"))
			},
			changed: 1,
		},
		"removed file": {edit: func(d dirs) { must(os.Remove(d.src + "/README")) }, removed: 1},
		"removed directory": {
			edit: func(d dirs) { must(os.RemoveAll(d.src + "/cmd/sub")) }, removed: 3,
		},
		"removed directory with products": {
			edit: func(d dirs) {
				must(os.RemoveAll(d.src + "/cmd/sub"))
				must(os.WriteFile(d.dst+"/cmd/sub/x.o", nil, 0o644))
			},
			removed: 2, foreign: []string{"cmd/sub", "cmd/sub/x.o"},
		},
		"one name of a file removed": {edit: func(d dirs) { must(os.Remove(d.src + "/cmd/two")) }, removed: 1},
		"first name of a file removed": {
			edit: func(d dirs) { must(os.Remove(d.src + "/cmd/sub/three")) }, removed: 1,
		},
		"link broken up": {
			edit: func(d dirs) {
				must(os.Remove(d.src + "/one"))
				must(os.WriteFile(d.src+"/one", []byte("same"), 0o644))
			},
			changed: 1,
		},
		"files become links": {
			edit: func(d dirs) {
				must(os.Remove(d.src + "/a-b"))
				must(os.Link(d.src+"/README", d.src+"/a-b"))
			},
			changed: 1,
		},
		"file to directory": {
			edit: func(d dirs) {
				must(os.Remove(d.src + "/README"))
				must(os.MkdirAll(d.src+"/README/x/y", 0o755))
			},
			changed: 3,
		},
		"directory to file": {
			edit: func(d dirs) {
				must(os.RemoveAll(d.src + "/cmd/sub"))
				must(os.WriteFile(d.src+"/cmd/sub", []byte("x"), 0o644))
				must(os.WriteFile(d.dst+"/cmd/sub/x.o", []byte("x"), 0o644)) // the source wins
			},
			changed: 1, removed: 2,
		},
		"directory to link": {
			edit: func(d dirs) {
				must(os.RemoveAll(d.src + "/cmd"))
				must(os.Symlink("a", d.src+"/cmd"))
			},
			changed: 1, removed: 5,
		},
		"link to directory": {
			edit: func(d dirs) {
				must(os.Remove(d.src + "/up"))
				must(os.MkdirAll(d.src+"/up/z", 0o755))
			},
			changed: 2,
		},
		"link retargeted": {
			edit: func(d dirs) {
				must(os.Remove(d.src + "/lib.so"))
				must(os.Symlink("lib.so.2", d.src+"/lib.so"))
			},
			changed: 1,
		},
		"pipe to file": {
			edit: func(d dirs) {
				must(os.Remove(d.src + "/pipe"))
				must(os.WriteFile(d.src+"/pipe", nil, 0o644))
			},
			changed: 1,
		},
		"renamed": {
			edit:    func(d dirs) { must(os.Rename(d.src+"/a", d.src+"/aa")) },
			changed: 2, removed: 2,
		},
		"case of names": {
			edit:    func(d dirs) { must(os.Rename(d.src+"/README", d.src+"/Readme")) },
			changed: 1, removed: 1,
		},

		"workspace: content": {
			edit: func(d dirs) { must(os.WriteFile(d.dst+"/README", []byte("xxxxxxx"), 0o644)) }, changed: 1,
		},
		"workspace: content, time set back": {
			edit: func(d dirs) {
				var st unix.Stat_t
				must(unix.Stat(d.dst+"/README", &st))
				must(os.WriteFile(d.dst+"/README", []byte("READ ME"), 0o644))
				must(os.Chtimes(d.dst+"/README", time.Time{}, time.Unix(st.Mtim.Unix())))
			},
			changed: 1,
		},
		"workspace: mode": {edit: func(d dirs) { must(os.Chmod(d.dst+"/README", 0)) }, changed: 1},
		"workspace: mode of a directory": {
			edit: func(d dirs) { must(os.Chmod(d.dst+"/cmd", 0)) }, changed: 1,
		},
		"workspace: touched": {
			edit: func(d dirs) { must(os.Chtimes(d.dst+"/README", time.Unix(5, 5), time.Unix(5, 5))) }, changed: 1,
		},
		"workspace: removed": {
			// The first name of "one" is among them, so all its names are made.
			edit: func(d dirs) { must(os.RemoveAll(d.dst + "/cmd")) }, changed: 7,
		},
		"workspace: removed in both": {
			edit: func(d dirs) {
				must(os.RemoveAll(d.dst + "/cmd"))
				must(os.RemoveAll(d.src + "/cmd"))
			},
		},
		"workspace: file to directory": {
			edit: func(d dirs) {
				must(os.Remove(d.dst + "/README"))
				must(os.MkdirAll(d.dst+"/README/x", 0o755))
			},
			changed: 1,
		},
		"workspace: directory to link that leads out": {
			edit: func(d dirs) {
				must(os.RemoveAll(d.dst + "/cmd"))
				must(os.Symlink(d.src, d.dst+"/cmd"))
			},
			changed: 7,
		},
		"workspace: file to link": {
			edit: func(d dirs) {
				must(os.Remove(d.dst + "/README"))
				must(os.Symlink(d.src+"/README", d.dst+"/README"))
			},
			changed: 1,
		},
		"workspace: file to socket": {
			edit: func(d dirs) {
				must(os.Remove(d.dst + "/README"))
				must(unix.Mknod(d.dst+"/README", unix.S_IFSOCK|0o600, 0))
			},
			changed: 1,
		},
		"workspace: two files made one": {
			edit: func(d dirs) {
				must(os.Remove(d.dst + "/a-b"))
				must(os.Link(d.dst+"/README", d.dst+"/a-b"))
			},
			changed: 1,
		},
		"workspace: two equal files made one": {
			edit: func(d dirs) {
				must(os.Remove(d.dst + "/equal2"))
				must(os.Link(d.dst+"/equal1", d.dst+"/equal2"))
			},
			changed: 1,
		},
		"workspace: one file made two": {
			edit: func(d dirs) {
				must(os.Remove(d.dst + "/one"))
				must(os.WriteFile(d.dst+"/one", []byte("same"), 0o644))
			},
			changed: 1,
		},
		"workspace: linked from a product": {
			edit:    func(d dirs) { must(os.Link(d.dst+"/README", d.dst+"/product")) },
			foreign: []string{"product"},
		},
		"workspace: dropped directory is a link now": {
			edit: func(d dirs) {
				must(os.RemoveAll(d.src + "/cmd/sub"))
				must(os.RemoveAll(d.dst + "/cmd/sub"))
				must(os.Symlink(d.src, d.dst+"/cmd/sub"))
			},
			removed: 1,
		},
		"product where the source puts a file": {
			edit: func(d dirs) {
				must(os.WriteFile(d.dst+"/gen.go", []byte("built"), 0o644))
				must(os.WriteFile(d.src+"/gen.go", []byte("mine!"), 0o644))
			},
			changed: 1,
		},
		"product where the source puts a directory": {
			edit: func(d dirs) {
				must(os.WriteFile(d.dst+"/gen", []byte("built"), 0o644))
				must(os.MkdirAll(d.src+"/gen/x", 0o755))
			},
			changed: 2,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			src, dst := t.TempDir(), t.TempDir()
			makeTree(t, src, sample...)
			makeTree(t, src, "equal1=equal", "equal2=equal")
			age(t, src)
			same := time.Now().Add(-time.Hour)
			must(errors.Join(os.Chtimes(src+"/equal1", same, same), os.Chtimes(src+"/equal2", same, same)))
			r := syncDirs(t, src, dst, nil)
			settle(r.Tree)
			tt.edit(dirs{src, dst})
			for _, racy := range []bool{true, false} {
				r = syncDirs(t, src, dst, r.Tree)
				if strings.HasPrefix(name, "workspace: linked") {
					want := look(t, src)
					have := look(t, dst)
					delete(have, "product")
					require.Equal(t, want, have)
				} else {
					requireSynced(t, src, dst, tt.foreign...)
				}
				require.Equal(t, tt.changed, r.Changed)
				require.Equal(t, tt.removed, r.Removed)
				require.Equal(t, scan(t, src, nil).Digest(), r.Tree.Digest())
				if racy {
					tt.changed, tt.removed = 0, 0 // the next one has nothing to do
				}
			}
		})
	}
}

func TestChangedFileIsReplacedNotWritten(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "a=old", "b=old", "keep=x")
	r := syncDirs(t, src, dst, nil)
	require.NoError(t, os.Link(dst+"/a", dst+"/product"))
	require.NoError(t, os.Link(dst+"/b", dst+"/moded"))
	kept := inode(t, dst+"/keep")
	write(t, src+"/a", "new")
	require.NoError(t, os.Chmod(src+"/b", 0o600))
	before := describe(t, dst+"/moded", "", map[uint64]string{})
	syncDirs(t, src, dst, r.Tree)
	require.Equal(t, "old", read(t, dst+"/product"))
	require.Equal(t, "new", read(t, dst+"/a"))
	require.Equal(t, before, describe(t, dst+"/moded", "", map[uint64]string{}))
	require.Equal(t, kept, inode(t, dst+"/keep"))
}

func TestXattrs(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "d/f=x", "l->d", "plain=x")
	set := func(p, name, value string) { require.NoError(t, unix.Lsetxattr(p, name, []byte(value), 0)) }
	set(src+"/d/f", "user.a", "1")
	set(src+"/d/f", "user.big", strings.Repeat("v", 2000))
	set(src+"/d/f", "user.overlay.opaque", "y")
	set(src+"/d", "user.dir", "2")
	acl := string([]byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 77, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255})
	set(src+"/d/f", "system.posix_acl_access", acl)
	if os.Geteuid() == 0 {
		set(src+"/d/f", "trusted.t", "3")
		set(src+"/d", "trusted.overlay.opaque", "y")
		set(src+"/l", "trusted.link", "4")
		set(src+"/d/f", "security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	} else {
		t.Log("not root: trusted.* and security.capability are not tried")
	}
	r := syncDirs(t, src, dst, nil)
	require.Empty(t, r.Notes)
	settle(r.Tree)
	_, err := unix.Lgetxattr(dst+"/d/f", "user.overlay.opaque", nil)
	require.ErrorIs(t, err, unix.ENODATA)
	_, err = unix.Lgetxattr(dst+"/d", "trusted.overlay.opaque", nil)
	require.ErrorIs(t, err, unix.ENODATA)
	require.Contains(t, look(t, dst)["d/f"], "user.a=\"1\"")
	require.Contains(t, look(t, dst)["d/f"], "posix_acl")
	requireSynced(t, src, dst)

	set(src+"/d/f", "user.a", "changed")
	require.NoError(t, unix.Removexattr(src+"/d/f", "user.big"))
	require.NoError(t, unix.Removexattr(src+"/d", "user.dir"))
	set(dst+"/plain", "user.byTheCommand", "x")
	r = syncDirs(t, src, dst, r.Tree)
	requireSynced(t, src, dst)
	require.Equal(t, 3, r.Changed)
	require.Zero(t, syncDirs(t, src, dst, r.Tree).Changed)
}

func TestInheritedACLIsNotKept(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	acl := []byte{2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 7, 0, 77, 0, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255, 16, 0, 7, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255}
	require.NoError(t, unix.Setxattr(dst, "system.posix_acl_default", acl, 0))
	makeTree(t, src, "d/f=x", "g=x", "p|")
	syncDirs(t, src, dst, nil)
	requireSynced(t, src, dst)
}

func TestSparseFilesStaySparse(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	const size = 64 << 20
	f, err := os.Create(src + "/disk")
	require.NoError(t, err)
	for _, at := range []int64{1 << 20, 40<<20 + 123} {
		_, err = f.WriteAt([]byte("data"), at)
		require.NoError(t, err)
	}
	require.NoError(t, f.Truncate(size))
	require.NoError(t, f.Close())
	require.NoError(t, os.Truncate(createEmpty(t, src+"/hole"), size))
	last := int64(0)
	tree := scan(t, src, nil)
	r, err := tree.SyncTo(context.Background(), src, dst, nil, func(done, total int64) {
		require.GreaterOrEqual(t, done, last)
		require.EqualValues(t, 2*size, total)
		last = done
	})
	require.NoError(t, err)
	require.EqualValues(t, 2*size, last)
	require.EqualValues(t, 2*size, r.Bytes)
	requireSynced(t, src, dst)
	for _, name := range []string{"disk", "hole"} {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(dst+"/"+name, &st))
		require.Less(t, st.Blocks*512, int64(1<<20), name)
	}
}

func createEmpty(t testing.TB, path string) string {
	t.Helper()
	require.NoError(t, os.WriteFile(path, nil, 0o644))
	return path
}

func TestSocketIsLeftOutWithANote(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "f=x")
	require.NoError(t, unix.Mknod(src+"/sock", unix.S_IFSOCK|0o600, 0))
	r := syncDirs(t, src, dst, nil)
	require.Equal(t, []Note{{Path: "sock", Reason: "socket left out"}}, r.Notes)
	require.NoFileExists(t, dst+"/sock")
	require.Equal(t, r.Notes, syncDirs(t, src, dst, r.Tree).Notes, "the stored tree tells it, too")
}

func TestDevices(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: devices cannot be made")
	}
	src, dst := t.TempDir(), t.TempDir()
	require.NoError(t, unix.Mknod(src+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	require.NoError(t, unix.Mknod(src+"/loop", unix.S_IFBLK|0o660, int(unix.Mkdev(7, 200))))
	require.NoError(t, os.Chown(src+"/null", 12, 34))
	r := syncDirs(t, src, dst, nil)
	requireSynced(t, src, dst)
	require.NoError(t, os.Remove(src+"/null"))
	require.NoError(t, unix.Mknod(src+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
	r2 := syncDirs(t, src, dst, r.Tree)
	requireSynced(t, src, dst)
	require.NotEqual(t, r.Tree.Digest(), r2.Tree.Digest(), "the device number counts")
}

func TestOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: owners cannot be given")
	}
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "d/f=x", "l->d", "p|")
	for _, p := range []string{"d", "d/f", "l", "p"} {
		require.NoError(t, os.Lchown(src+"/"+p, 1234, 567))
	}
	require.NoError(t, os.Chmod(src+"/d/f", 0o755|os.ModeSetuid|os.ModeSetgid))
	r := syncDirs(t, src, dst, nil)
	requireSynced(t, src, dst)
	require.NoError(t, os.Lchown(src+"/d/f", 7, 7))
	require.NoError(t, os.Lchown(src+"/l", 7, 7))
	r = syncDirs(t, src, dst, r.Tree)
	require.Equal(t, 2, r.Changed)
	requireSynced(t, src, dst)
}

// A full disk is a clear error, and the next sync with room finishes the work
// and knows what to remove.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: no small file system can be mounted")
	}
	src, dst := t.TempDir(), t.TempDir()
	runtime.LockOSThread() // the mount namespace is this thread's, which ends with the test
	require.NoError(t, unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_FS))
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	dst = mountSmall(t, dst)
	for _, n := range []string{"a", "b", "c", "d"} {
		write(t, src+"/"+n, strings.Repeat(n, 400<<10))
	}
	tree := scan(t, src, nil)
	r, err := tree.SyncTo(context.Background(), src, dst, nil, nil)
	require.ErrorIs(t, err, unix.ENOSPC)
	require.NotNil(t, r.Tree)
	for _, n := range []string{"a", "b", "d"} {
		require.NoError(t, os.Remove(src+"/"+n))
	}
	r = syncDirs(t, src, dst, r.Tree)
	requireSynced(t, src, dst)
}

// mountSmall gives a file system of one megabyte, named through a descriptor
// so that goroutines in other mount namespaces reach it.
func mountSmall(t *testing.T, dir string) string {
	t.Helper()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	f, err := os.Open(dir)
	require.NoError(t, err)
	require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	t.Cleanup(func() { require.NoError(t, f.Close()) })
	return fsat.ProcPath(int(f.Fd())) + "/."
}

func TestCancelled(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, sample...)
	ctx, cancel := context.WithCancel(context.Background())
	tree := scan(t, src, nil)
	cancel()
	_, err := Scan(ctx, src, Options{}, nil)
	require.ErrorIs(t, err, context.Canceled)
	_, err = tree.SyncTo(ctx, src, dst, nil, nil)
	require.ErrorIs(t, err, context.Canceled)

	ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	r, err := tree.SyncTo(ctx, src, dst, nil, func(done, _ int64) {
		if done > 5 {
			cancel()
		}
	})
	require.ErrorIs(t, err, context.Canceled)
	r = syncDirs(t, src, dst, r.Tree)
	requireSynced(t, src, dst)
}

func TestSyncIntoItselfIsRefused(t *testing.T) {
	src := t.TempDir()
	makeTree(t, src, "f=x")
	tree := scan(t, src, nil)
	_, err := tree.SyncTo(context.Background(), src, src, nil, nil)
	require.ErrorContains(t, err, "source directory itself")
	_, err = tree.SyncTo(context.Background(), src, filepath.Join(src, "none"), nil, nil)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// What a cut-off sync left is known from Intent and removed once the source
// has it no more.
func TestIntentNamesWhatMayBeLeft(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "old/x=1", "stay=1")
	r := syncDirs(t, src, dst, nil)
	require.NoError(t, os.RemoveAll(src+"/old"))
	makeTree(t, src, "new/y=2", "stay2=>stay")
	tree := scan(t, src, r.Tree)
	intent := tree.Intent(r.Tree)
	require.Equal(t, []string{"new", "new/y", "old", "old/x", "stay", "stay2"}, paths(intent))
	_, err := tree.SyncTo(context.Background(), src, dst, r.Tree, nil)
	require.NoError(t, err)
	// killed before its result was stored
	write(t, dst+"/old/x", "1")
	require.NoError(t, os.RemoveAll(src+"/new"))
	enc, err := intent.Encode()
	require.NoError(t, err)
	stored, err := Decode(enc)
	require.NoError(t, err)
	r = syncDirs(t, src, dst, stored)
	requireSynced(t, src, dst)
	require.Equal(t, 4, r.Removed)
	require.Zero(t, r.Changed)
}
