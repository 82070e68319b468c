package overlayfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// methods are the ways to mount; every kernel that has the first has both.
var methods = map[string]method{"descriptor": byDescriptor, "classic": classic}

func eachMethod(t *testing.T, f func(t *testing.T, s stack, mount func(Mount) error)) {
	needRoot(t)
	for name, method := range methods {
		for _, user := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/user=%t", name, user), func(t *testing.T) {
				s := newStack(t)
				f(t, s, func(m Mount) error {
					m.UserXattr = user
					return m.mountWith(s.path("m"), method)
				})
			})
		}
	}
}

func TestTopmostLayerFirst(t *testing.T) {
	eachMethod(t, func(t *testing.T, s stack, mount func(Mount) error) {
		require.NoError(t, mount(s.writable(
			s.tree("top", "same=top", "d/top"),
			s.tree("middle", "same=middle", "d/middle"),
			s.tree("bottom", "same=bottom", "d/bottom=b"),
		)))
		require.Equal(t, []string{"d/", "d/bottom=b", "d/middle=", "d/top=", "same=top"}, s.show())

		require.NoError(t, os.WriteFile(s.path("m/same"), []byte("new"), 0o644))
		require.NoError(t, os.Remove(s.path("m/d/top")))
		s.unmount()
		require.Equal(t, []string{"d/", "d/top", "same=new"}, show(t, s.path("upper")), "the upper directory holds the difference alone")
		require.Equal(t, "top", read(t, s.path("top/same")), "lower layers do not change")
	})
}

func TestReadOnly(t *testing.T) {
	eachMethod(t, func(t *testing.T, s stack, mount func(Mount) error) {
		bottom := s.tree("bottom", "f=bottom", "g")
		require.NoError(t, mount(s.writable(bottom)))
		require.NoError(t, os.WriteFile(s.path("m/f"), []byte("upper"), 0o644))
		require.NoError(t, os.Remove(s.path("m/g")))
		s.unmount()

		for name, m := range map[string]Mount{
			"without upper":     {Lower: []string{s.path("upper"), bottom}},
			"upper as topmost":  {Lower: []string{bottom}, Upper: s.path("upper"), ReadOnly: true},
			"with a work, too":  {Lower: []string{bottom}, Upper: s.path("upper"), Work: s.path("work"), ReadOnly: true},
			"and said to be so": {Lower: []string{s.path("upper"), bottom}, ReadOnly: true},
		} {
			require.NoError(t, mount(m), name)
			require.Equal(t, []string{"f=upper"}, s.show(), name)
			require.ErrorIs(t, os.WriteFile(s.path("m/f"), nil, 0o644), syscall.EROFS, name)
			require.ErrorIs(t, os.Remove(s.path("m/f")), syscall.EROFS, name)
			require.ErrorIs(t, os.Mkdir(s.path("m/d"), 0o755), syscall.EROFS, name)
			require.ErrorIs(t, unix.Mount("", s.path("m"), "", unix.MS_REMOUNT, ""), syscall.EROFS,
				"%s: without an upper directory nothing can make it writable", name)
			busy, err := InUse(s.path("upper"))
			require.NoError(t, err)
			require.False(t, busy, "%s: no upper directory is mounted", name)
			s.unmount()
		}
	})
}

func TestNamesOfAnyBytes(t *testing.T) {
	long := strings.Repeat(strings.Repeat("x", 200)+"/", 8)
	eachMethod(t, func(t *testing.T, s stack, mount func(Mount) error) {
		for i, name := range []string{
			"a,b", "a:b", `a\b`, `a\,b\:c`, "a b", "new\nline", `"quoted"`, "#", "=,upperdir=/,", "\xff\xfe", long,
		} {
			top := s.tree(fmt.Sprintf("%d/%s/top", i, name), "top")
			bottom := s.tree(fmt.Sprintf("%d/%s/bottom", i, name), "bottom")
			m := Mount{Lower: []string{top, bottom}}
			m.Upper = s.tree(fmt.Sprintf("%d/%s/upper", i, name), "upper")
			m.Work = s.tree(fmt.Sprintf("%d/%s/work", i, name))
			require.NoError(t, mount(m), "%q", name)
			require.Equal(t, []string{"bottom=", "top=", "upper="}, s.show(), "%q", name)
			s.unmount()
		}
	})
	t.Run("target", func(t *testing.T) {
		needRoot(t)
		s := newStack(t)
		for _, name := range []string{"a,b:c", "new\nline", long} {
			target := s.tree(name)
			require.NoError(t, s.writable(s.tree("a", "f")).Mount(target), "%q", name)
			require.Equal(t, []string{"f="}, show(t, target))
			require.NoError(t, unix.Unmount(target, 0))
		}
	})
}

func TestDepth(t *testing.T) {
	eachMethod(t, func(t *testing.T, s stack, mount func(Mount) error) {
		var lower []string
		for i := range MaxLayers + 1 {
			// A long common path: all of them together pass the page that
			// mount(2) takes many times.
			lower = append(lower, s.tree(fmt.Sprintf("%s/%d", strings.Repeat("l", 200), i)))
		}
		require.NoError(t, os.WriteFile(filepath.Join(lower[MaxLayers-1], "deep"), nil, 0o644))

		before := openFiles(t)
		require.NoError(t, mount(s.writable(lower[:MaxLayers]...)))
		require.Equal(t, before, openFiles(t), "no descriptor stays open")
		require.Equal(t, []string{"deep="}, s.show())
		s.unmount()

		err := mount(s.writable(lower...))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "501")
		require.ErrorContains(t, err, "limit is 500")
		require.Zero(t, mounts(t, s.dir))
	})
}

// The kernel's limit is the one that the package tells of.
func TestKernelLimit(t *testing.T) {
	needRoot(t)
	s := newStack(t)
	c, err := newContext("overlay")
	require.NoError(t, err)
	defer c.close()
	l := &layers{upper: -1, work: -1}
	defer func() { l.close() }()
	for i := range MaxLayers + 1 {
		fd, err := openDir(s.tree(fmt.Sprint(i)))
		require.NoError(t, err)
		l.lower = append(l.lower, fd)
	}
	err = c.directories(l)
	require.ErrorIs(t, err, unix.EINVAL)
	require.ErrorContains(t, err, "lower layer 501")
	require.ErrorContains(t, err, "limit is 500", "the kernel's own words are part of the error")
}

func device(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Dev
}

func TestRefused(t *testing.T) {
	needRoot(t)
	s := newStack(t)
	a, b := s.tree("a"), s.tree("b")
	file := filepath.Join(s.tree("files", "file"), "file")
	shm := t.TempDir()
	if dir, err := os.MkdirTemp("/dev/shm", "overlayfs-test-"); err == nil {
		shm = dir
		t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	}
	missing := s.path("missing")
	tests := map[string]struct {
		mount  Mount
		target string
		is     []error
		not    error
		text   string
	}{
		"lower missing":      {mount: s.writable(a, missing), is: []error{errdefs.ErrNotFound, unix.ENOENT}, text: missing},
		"upper missing":      {mount: Mount{Lower: []string{a}, Upper: missing, Work: s.path("work")}, is: []error{errdefs.ErrNotFound}, text: missing},
		"work missing":       {mount: Mount{Lower: []string{a}, Upper: s.path("upper"), Work: missing}, is: []error{errdefs.ErrNotFound}, text: missing},
		"target missing":     {mount: s.writable(a), target: missing, is: []error{errdefs.ErrInvalidArgument, unix.ENOENT}, not: errdefs.ErrNotFound, text: missing},
		"target is a file":   {mount: s.writable(a), target: file, is: []error{errdefs.ErrInvalidArgument, unix.ENOTDIR}, text: file},
		"lower is a file":    {mount: s.writable(file), is: []error{unix.ENOTDIR}, not: errdefs.ErrNotFound, text: file},
		"nothing":            {mount: Mount{}, is: []error{errdefs.ErrInvalidArgument}},
		"no lower":           {mount: s.writable(), is: []error{errdefs.ErrInvalidArgument}, text: "needs a lower"},
		"one lower alone":    {mount: Mount{Lower: []string{a}}, is: []error{errdefs.ErrInvalidArgument}, text: "needs two"},
		"upper alone":        {mount: Mount{Upper: a, ReadOnly: true}, is: []error{errdefs.ErrInvalidArgument}, text: "needs two"},
		"upper, no work":     {mount: Mount{Lower: []string{a}, Upper: b}, is: []error{errdefs.ErrInvalidArgument}, text: "belong together"},
		"work, no upper":     {mount: Mount{Lower: []string{a, b}, Work: b}, is: []error{errdefs.ErrInvalidArgument}, text: "belong together"},
		"volatile read-only": {mount: Mount{Lower: []string{a, b}, Volatile: true}, is: []error{errdefs.ErrInvalidArgument}, text: "volatile"},
		"a lower twice":      {mount: s.writable(a, b, a), is: []error{errdefs.ErrInvalidArgument, unix.ELOOP}, text: "twice"},
		"work elsewhere":     {mount: Mount{Lower: []string{a}, Upper: s.path("upper"), Work: shm}, is: []error{unix.EINVAL}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if name == "work elsewhere" && device(t, shm) == device(t, s.path("upper")) {
				t.Skip("/dev/shm is no second file system")
			}
			before := openFiles(t)
			target := s.path("m")
			if test.target != "" {
				target = test.target
			}
			err := test.mount.Mount(target)
			require.Error(t, err)
			for _, is := range test.is {
				require.ErrorIs(t, err, is)
			}
			if test.not != nil {
				require.NotErrorIs(t, err, test.not)
			}
			require.ErrorContains(t, err, test.text)
			require.Zero(t, mounts(t, s.dir), "nothing is mounted after an error")
			require.Equal(t, before, openFiles(t), "no descriptor stays open")
		})
	}
}

func TestFallback(t *testing.T) {
	needRoot(t)
	none := func(*layers, Mount, int) error { return fmt.Errorf("fsopen: %w", errNoMethod) }
	t.Run("goes on to the next method", func(t *testing.T) {
		s := newStack(t)
		require.NoError(t, s.writable(s.tree("a", "f")).mountWith(s.path("m"), none, classic))
		require.Equal(t, []string{"f="}, s.show())
	})
	t.Run("says what is missing", func(t *testing.T) {
		s := newStack(t)
		err := s.writable(s.tree("a")).mountWith(s.path("m"), none, none)
		require.ErrorIs(t, err, errdefs.ErrNotImplemented)
		require.ErrorContains(t, err, "not supported by this kernel")
	})
	t.Run("keeps the reason of the first method", func(t *testing.T) {
		s := newStack(t)
		a := s.tree("a")
		err := s.writable(a, a).mountWith(s.path("m"), none, classic)
		require.ErrorIs(t, err, unix.ELOOP)
		require.NotErrorIs(t, err, errdefs.ErrNotImplemented)
		require.ErrorContains(t, err, "without descriptors")
	})
	t.Run("leaves the working directory of others alone", func(t *testing.T) {
		before, err := os.Getwd()
		require.NoError(t, err)
		s := newStack(t)
		for range 20 {
			require.NoError(t, s.writable(s.tree("a")).mountWith(s.path("m"), classic))
			s.unmount()
			link, err := os.Readlink("/proc/self/cwd")
			require.NoError(t, err)
			require.Equal(t, before, link)
		}
	})
}

// The kernel's words reach the error.
func TestKernelLog(t *testing.T) {
	needRoot(t)
	c, err := newContext("overlay")
	require.NoError(t, err)
	defer c.close()
	err = c.set("nonsense", "1")
	require.ErrorIs(t, err, unix.EINVAL)
	require.ErrorContains(t, err, "Unknown parameter 'nonsense'")
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(content)
}
