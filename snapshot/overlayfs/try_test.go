package overlayfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestTry(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		dir := s.tree("store")
		files := openFiles(t)
		support, err := Try(t.Context(), dir, TryOptions{UserXattr: user})
		require.NoError(t, err)
		require.True(t, support.OK, support.Reason)
		require.Empty(t, support.Reason)
		require.Equal(t, MaxLayers, support.MaxLayers)
		for _, name := range []string{
			featureStack, featureReadOnly, featureProbe, featureWhiteout, featureOpaque, featureOrigin, featureVolatile,
		} {
			require.True(t, support.Features[name], name)
		}
		requireClean(t, dir)
		require.Equal(t, files, openFiles(t))
	})
}

// requireClean fails if a trial left anything in dir.
func requireClean(t *testing.T, dir string) {
	t.Helper()
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, names)
	require.Zero(t, mounts(t, dir))
}

// An overlay mount cannot be an upper layer: only a trial tells.
func TestTryOnOverlay(t *testing.T) {
	needRoot(t)
	s := newStack(t)
	s.mount(s.writable(s.tree("a")))
	support, err := Try(t.Context(), s.path("m"), TryOptions{})
	require.NoError(t, err)
	require.False(t, support.OK)
	require.NotEmpty(t, support.Reason)
	t.Log(support.Reason)
	require.NotContains(t, support.Reason, "trial-", "the reason is for people")
	require.NotContains(t, support.Reason, "\n")
	requireClean(t, s.path("m"))
}

func TestTryCannotBeMade(t *testing.T) {
	dir := t.TempDir()
	_, err := Try(t.Context(), filepath.Join(dir, "missing"), TryOptions{})
	require.ErrorIs(t, err, os.ErrNotExist)

	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	cancel(reason)
	_, err = Try(ctx, dir, TryOptions{})
	require.ErrorIs(t, err, reason)
	requireClean(t, dir)
}

func TestTryOnFullDisk(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=8"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	_, err := Try(t.Context(), dir, TryOptions{})
	require.ErrorIs(t, err, unix.ENOSPC)
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, names)
}

func init() {
	// As an ordinary user, in a user and mount namespace where it may mount.
	helpers["userns"] = func(args []string) error { return inUserNamespace(args[0]) }
	// As an ordinary user without any namespace.
	helpers["plain"] = func(args []string) error {
		for _, user := range []bool{false, true} {
			support, err := Try(context.Background(), args[0], TryOptions{UserXattr: user})
			if err != nil {
				return err
			}
			if support.OK || !strings.Contains(support.Reason, "not permitted") {
				return fmt.Errorf("an ordinary user cannot mount, but: %+v", support)
			}
			if names, err := os.ReadDir(args[0]); err != nil || len(names) > 0 {
				return errors.Join(fmt.Errorf("left behind: %v", names), err)
			}
		}
		return nil
	}
}

// inUserNamespace repeats the life of a workspace below dir.
func inUserNamespace(dir string) error {
	support, err := Try(context.Background(), dir, TryOptions{UserXattr: true})
	if err != nil || !support.OK {
		return fmt.Errorf("try: %+v %w", support, err)
	}
	for _, name := range []string{"a", "b", "upper", "work", "m"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "a/deleted"), nil, 0o644); err != nil {
		return err
	}
	m := Mount{
		Lower: []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}, Upper: filepath.Join(dir, "upper"),
		Work: filepath.Join(dir, "work"), UserXattr: true, Volatile: true,
	}
	target := filepath.Join(dir, "m")
	for name, method := range methods {
		if err := RemoveVolatileMark(m.Work); err != nil {
			return err
		}
		if err := m.mountWith(target, method); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if busy, err := InUse(m.Upper); err != nil || !busy {
			return fmt.Errorf("%s: in use while mounted: %t %w", name, busy, err)
		}
		if err := os.WriteFile(filepath.Join(target, name), nil, 0o644); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(target, "deleted")); err != nil {
			return err
		}
		if err := unix.Unmount(target, 0); err != nil {
			return err
		}
		if busy, err := InUse(m.Upper); err != nil || busy {
			return fmt.Errorf("%s: in use after unmounting: %t %w", name, busy, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(m.Upper, name), &st); err != nil || st.Uid != uint32(os.Getuid()) {
			return fmt.Errorf("%s: owner %d: %w", name, st.Uid, err)
		}
	}
	if !isWhiteout(filepath.Join(m.Upper, "deleted")) {
		return errors.New("no whiteout in the upper directory")
	}
	return nil
}

func TestOrdinaryUser(t *testing.T) {
	needRoot(t)
	const uid = 64123 // any id that owns nothing
	for name, attr := range map[string]*syscall.SysProcAttr{
		"plain": {Credential: &syscall.Credential{Uid: uid, Gid: uid}},
		"userns": {
			Credential:  &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: true},
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
			AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_DAC_OVERRIDE},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); name == "userns" && (err != nil || string(limit) == "0\n") {
				t.Skip("this kernel has no user namespaces")
			}
			// t.TempDir is closed to others, and so is the test binary.
			dir, err := os.MkdirTemp("", "overlayfs-test-")
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
			require.NoError(t, os.Chmod(dir, 0o755))
			self := filepath.Join(dir, "self")
			copyFile(t, "/proc/self/exe", self)
			own := filepath.Join(dir, "own")
			require.NoError(t, os.Mkdir(own, 0o700))
			require.NoError(t, os.Chown(own, uid, uid))

			cmd := exec.CommandContext(t.Context(), self, own)
			cmd.Dir = "/"
			cmd.Env = []string{envHelper + "=" + name}
			cmd.SysProcAttr = attr
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, string(out))
		})
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	require.NoError(t, err)
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	require.NoError(t, err)
	_, err = io.Copy(out, in)
	require.NoError(t, errors.Join(err, out.Close()))
}
