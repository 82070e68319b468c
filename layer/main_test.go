package layer_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
)

// envPrivate says that the tests are in a mount namespace of their own.
const envPrivate = "LAYER_TEST_PRIVATE"

// TestMain starts the tests again in a mount namespace of their own, so that
// nothing of what they mount is seen outside or stays when they are killed.
func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(envPrivate) == "" {
		fmt.Fprintln(os.Stderr, "no mount namespace for the tests:", intoPrivateNamespace())
	}
	os.Exit(m.Run())
}

func intoPrivateNamespace() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), envPrivate+"=1"))
}

func needMounts(t testing.TB) {
	t.Helper()
	if os.Getenv(envPrivate) == "" {
		t.Skip("needs root, to mount")
	}
}

// overlay mounts a stack, topmost first, and calls do with what it shows. With
// upper set changes go there.
func overlay(t tb, form layer.Form, lower []string, upper string, do func(root string)) {
	t.Helper()
	dir := mkdir(t)
	root, work, empty := filepath.Join(dir, "root"), filepath.Join(dir, "work"), filepath.Join(dir, "empty")
	for _, d := range []string{root, work, empty, empty + "2"} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	options := "index=off,metacopy=off,redirect_dir=nofollow,xino=off,lowerdir=" + strings.Join(append(lower[:len(lower):len(lower)], empty, empty+"2"), ":")
	if upper != "" {
		options += ",upperdir=" + upper + ",workdir=" + work
	}
	if form == layer.OverlayUser {
		options += ",userxattr"
	}
	require.NoError(t, unix.Mount("overlay", root, "overlay", 0, options), options)
	defer func() { require.NoError(t, unix.Unmount(root, 0)) }()
	do(root)
}

// mkdir is a fresh directory on a file system without a disk behind it, where
// there is one: these tests make many files.
func mkdir(t tb) string {
	t.Helper()
	base := "/dev/shm"
	if unix.Access(base, unix.W_OK) != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "layer-test-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}
