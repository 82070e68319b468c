package workspace_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace"
	"github.com/lamina-build/lamina/workspace/output"
	"github.com/lamina-build/lamina/workspace/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.Init()
	goleak.VerifyTestMain(m)
}

// bench is a source tree, a store, and a place for outputs.
type bench struct {
	testing.TB
	ctx            context.Context
	root, src, dst string
	driver         string
	stdout, stderr bytes.Buffer
}

// newBench skips who cannot mount; the end of the test checks the store.
func newBench(t testing.TB, driver string) *bench {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts without a helper process")
	}
	dir := t.TempDir()
	b := &bench{
		TB: t, ctx: context.Background(), driver: driver,
		root: filepath.Join(dir, "store"), src: filepath.Join(dir, "src"), dst: filepath.Join(dir, "out"),
	}
	require.NoError(t, os.MkdirAll(b.src, 0o755))
	t.Cleanup(func() {
		if !t.Failed() {
			b.check()
		}
	})
	return b
}

func forDrivers(t *testing.T, fn func(b *bench)) {
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) { fn(newBench(t, driver)) })
	}
}

func (b *bench) open(ctx context.Context, readOnly bool) (*cache.Manager, error) {
	return cache.Open(ctx, cache.Options{Root: b.root, ReadOnly: readOnly, DriverName: b.driver, LockTimeout: 10 * time.Second, SyncInterval: -1})
}

// look runs fn with the store open.
func (b *bench) look(fn func(m *cache.Manager)) {
	b.Helper()
	m, err := b.open(b.ctx, false)
	require.NoError(b, err)
	defer func() { require.NoError(b, m.Close()) }()
	fn(m)
}

func (b *bench) check() {
	b.Helper()
	b.look(func(m *cache.Manager) {
		for f, err := range m.Check(b.ctx) {
			require.NoError(b, err)
			require.Fail(b, "finding", "%+v", f)
		}
	})
	require.FileExists(b, filepath.Join(b.root, "clean"))
	holds, err := os.ReadDir(filepath.Join(b.root, "holds"))
	require.NoError(b, err)
	require.Empty(b, holds, "holds are left")
}

func (b *bench) write(name, text string) {
	b.Helper()
	path := filepath.Join(b.src, name)
	require.NoError(b, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(b, os.WriteFile(path, []byte(text), 0o644))
}

// job runs a shell script. Changes adapt it.
func (b *bench) job(script string, changes ...func(*workspace.Job)) workspace.Job {
	j := workspace.Job{
		Root: b.root, Open: b.open, Key: "k", Args: []string{"sh", "-c", script},
		Env: []string{"PATH=" + os.Getenv("PATH"), "TERM=dumb"}, Source: b.src,
		Private: true, Stdout: &b.stdout, Stderr: &b.stderr,
	}
	for _, c := range changes {
		c(&j)
	}
	return j
}

func (b *bench) run(script string, changes ...func(*workspace.Job)) workspace.Result {
	b.Helper()
	b.stdout.Reset()
	b.stderr.Reset()
	res, err := workspace.Run(b.ctx, b.job(script, changes...))
	require.NoError(b, err, "%s%s", b.stdout.String(), b.stderr.String())
	return res
}

func (b *bench) out(path string) func(*workspace.Job) {
	return func(j *workspace.Job) {
		j.Outputs = append(j.Outputs, output.Spec{Path: path, Dest: filepath.Join(b.dst, path)})
	}
}

func env(kv ...string) func(*workspace.Job) {
	return func(j *workspace.Job) { j.Env = append(j.Env, kv...) }
}

func TestARunIsCachedAndIncremental(t *testing.T) {
	forDrivers(t, func(b *bench) {
		b.write("a.txt", "one")
		const script = "echo out; echo err >&2; cat a.txt >> built; cp built result"
		first := b.run(script, b.out("result"))
		require.Equal(b, []string{"first"}, first.Why)
		require.False(b, first.Cached)
		require.Equal(b, 1, first.Changed)
		require.Equal(b, "out\n", b.stdout.String())
		require.Equal(b, "err\n", b.stderr.String())
		require.Equal(b, "one", b.read("result"))

		require.NoError(b, os.RemoveAll(b.dst))
		second := b.run(script, b.out("result"))
		require.True(b, second.Cached)
		require.Empty(b, second.Why)
		require.Equal(b, first.ID, second.ID)
		require.Equal(b, first.SourceDigest, second.SourceDigest)
		require.Equal(b, "out\n", b.stdout.String(), "the log is replayed")
		require.Equal(b, "err\n", b.stderr.String())
		require.Equal(b, "one", b.read("result"))

		var key string
		b.look(func(m *cache.Manager) {
			rec, err := m.Lookup(b.ctx, first.ID)
			require.NoError(b, err)
			key = rec.Key
			require.Equal(b, cache.Committed, rec.State)
			require.Positive(b, rec.Cost)
		})
		b.write("a.txt", "two")
		third := b.run(script, b.out("result"))
		require.Equal(b, []string{"source", "source:a.txt"}, third.Why)
		require.Equal(b, 1, third.SourceChanges)
		require.True(b, third.Reopened)
		require.Equal(b, first.ID, third.PreviousID)
		require.NotEqual(b, first.ID, third.ID)
		require.Equal(b, 1, third.Changed)
		require.Equal(b, "onetwo", b.read("result"), "build products stay")
		b.look(func(m *cache.Manager) {
			rec, err := m.Lookup(b.ctx, third.ID)
			require.NoError(b, err)
			require.Equal(b, key, rec.Key, "same snapshot")
			_, err = m.Lookup(b.ctx, first.ID)
			require.ErrorIs(b, err, errdefs.ErrNotFound)
		})
	})
}

func (b *bench) read(name string) string {
	b.Helper()
	data, err := os.ReadFile(filepath.Join(b.dst, name))
	require.NoError(b, err)
	return string(data)
}

func TestTheSourceIsMirrored(t *testing.T) {
	b := newBench(t, "overlay")
	b.write("keep", "1")
	b.write("gone", "2")
	b.write("dir/gone", "3")
	b.write("left.o", "excluded")
	exclude := func(j *workspace.Job) { j.Exclude = []string{"*.o"} }
	const list = "find . -type f | sort | xargs"
	b.run("touch product; "+list, exclude)
	require.Equal(t, "./dir/gone ./gone ./keep ./product\n", b.stdout.String())
	require.NoError(t, os.Remove(filepath.Join(b.src, "gone")))
	require.NoError(t, os.RemoveAll(filepath.Join(b.src, "dir")))
	res := b.run(list+"; test ! -e dir", exclude)
	require.Equal(t, "./keep ./product\n", b.stdout.String())
	require.Equal(t, 3, res.Removed)
	require.Equal(t, []string{"source", "source:dir", "source:dir/gone", "source:gone", "command"}, res.Why)
	require.Equal(t, 3, res.SourceChanges)
	b.run(list, func(j *workspace.Job) { j.Source = "" })
	require.Equal(t, "./product\n", b.stdout.String(), "a source that is given up is removed")
}

// What a run itself writes below the source is not source: it would never be
// cached.
func TestOutputsAndStoreInTheSource(t *testing.T) {
	b := newBench(t, "overlay")
	b.root = filepath.Join(b.src, ".lamina")
	b.write("a", "1")
	into := func(j *workspace.Job) {
		j.Outputs = []output.Spec{{Path: "bin/app", Dest: filepath.Join(b.src, "bin/app")}}
	}
	const script = "mkdir -p bin; echo x > bin/app; ls -A"
	b.run(script, into)
	require.Equal(t, "a\nbin\n", b.stdout.String())
	require.True(t, b.run(script, into).Cached)
	require.True(t, b.run(script, into).Cached)
}

func TestWhatCounts(t *testing.T) {
	b := newBench(t, "overlay")
	b.write("a", "1")
	run := func(changes ...func(*workspace.Job)) []string { return b.run("true", changes...).Why }
	secret := "hunter2-" + fmt.Sprint(time.Now().UnixNano())
	require.Equal(t, []string{"first"}, run(env("SECRET="+secret, "B=1")))
	require.Empty(t, run(env("SECRET="+secret, "B=1")))
	require.Empty(t, run(env("SECRET="+secret, "B=1", "TERM=xterm", "SSH_TTY=/dev/pts/1")), "a session's variables")
	require.Equal(t, []string{"env:B", "env:C"}, run(env("SECRET="+secret, "C=1")))
	require.Equal(t, []string{"env:SECRET"}, run(env("C=1")))
	require.Equal(t, []string{"no-memo"}, run(env("C=1"), func(j *workspace.Job) { j.NoMemo = true }))
	ignore := func(j *workspace.Job) { j.IgnoreEnv = []string{"D", "CI_*"} }
	require.Empty(t, run(env("C=1", "D=1", "CI_RUN=7"), ignore))
	require.Equal(t, []string{"env:D"}, run(env("C=1", "D=1", "CI_RUN=7"), func(j *workspace.Job) { j.IgnoreEnv = []string{"CI_*"} }))
	dir := t.TempDir()
	mounted := func(j *workspace.Job) { j.Mounts = []sandbox.Mount{{Source: dir, Target: dir, ReadOnly: true}} }
	require.Equal(t, []string{"mounts", "env:C", "env:D"}, run(mounted))
	require.NoError(t, os.Chmod(filepath.Join(b.src, "a"), 0o755))
	require.Equal(t, []string{"source", "source:a"}, run(mounted))
	for i := range 8 {
		b.write(fmt.Sprint("new", i), "1")
	}
	res := b.run("true", mounted)
	require.Equal(t, []string{"source", "source:new0", "source:new1", "source:new2", "source:new3", "source:new4"}, res.Why)
	require.Equal(t, 8, res.SourceChanges)

	db, err := os.ReadFile(filepath.Join(b.root, cache.StoreFile))
	require.NoError(t, err)
	require.NotContains(t, string(db), secret, "of the environment digests only are stored")
}

func TestAFailedRunKeepsItsWorkspace(t *testing.T) {
	b := newBench(t, "overlay")
	b.write("a", "1")
	res := b.run("echo partial > product; echo failing >&2; exit 7")
	require.Equal(t, 7, res.ExitCode)
	res = b.run("echo partial > product; echo failing >&2; exit 7")
	require.Equal(t, []string{"failed"}, res.Why, "nothing is memoized")
	require.Equal(t, 7, res.ExitCode)
	res = b.run("cat product")
	require.Equal(t, "partial\n", b.stdout.String())
	require.Equal(t, []string{"command", "failed"}, res.Why)

	_, err := workspace.Run(b.ctx, b.job("true", func(j *workspace.Job) { j.Args = []string{"no-such-command"} }))
	var start *sandbox.StartError
	require.ErrorAs(t, err, &start)
	require.Equal(t, 127, start.Status())
	require.Equal(t, []string{"command", "failed"}, b.run("cat product").Why)
}

func TestMissingOutputs(t *testing.T) {
	b := newBench(t, "overlay")
	_, err := workspace.Run(b.ctx, b.job("echo 1 > one", b.out("one"), b.out("two")))
	var missing *output.MissingError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"two"}, missing.Paths)
	require.NoDirExists(t, b.dst, "nothing is written")
	res := b.run("echo 1 > one", b.out("one"))
	require.Equal(t, []string{"failed"}, res.Why, "nothing is memoized")
	require.True(t, b.run("echo 1 > one", b.out("one")).Cached)
	_, err = workspace.Run(b.ctx, b.job("echo 1 > one", b.out("one"), b.out("two")))
	require.ErrorIs(t, err, errdefs.ErrNotFound, "the command is asked for an output that was not wanted before")
}

func TestAFinalizedWorkspaceGetsAChild(t *testing.T) {
	forDrivers(t, func(b *bench) {
		b.write("a", "1")
		first := b.run("echo 1 >> product")
		b.look(func(m *cache.Manager) {
			imm, err := m.Get(b.ctx, first.ID, cache.GetOptions{})
			require.NoError(b, err)
			require.NoError(b, imm.Finalize(b.ctx))
			require.NoError(b, imm.Release(b.ctx))
		})
		require.True(b, b.run("echo 1 >> product").Cached)
		b.write("a", "2")
		second := b.run("echo 1 >> product; wc -l < product")
		require.Equal(b, "2\n", b.stdout.String())
		require.False(b, second.Reopened)
		require.Equal(b, first.ID, second.PreviousID)
		require.Equal(b, 1, second.Changed, "the parent's files are as they were synced")
		third := b.run("echo 1 >> product; wc -l < product", env("X=1"))
		require.Equal(b, "3\n", b.stdout.String())
		require.True(b, third.Reopened)
		require.Equal(b, second.ID, third.PreviousID)
		b.look(func(m *cache.Manager) {
			ids, err := m.Search(b.ctx, workspace.Index("k"))
			require.NoError(b, err)
			require.Equal(b, []cache.ID{third.ID}, ids)
		})
	})
}

// interrupt runs script until it makes the file "started" in the dir that is
// mounted, and cancels it then.
func (b *bench) interrupt(script string) {
	b.Helper()
	dir := b.TempDir()
	ctx, cancel := context.WithCancelCause(b.ctx)
	defer cancel(nil)
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(filepath.Join(dir, "started")); err == nil {
				cancel(sandbox.SignalError{Signal: 2})
			}
		}
	}()
	_, err := workspace.Run(ctx, b.job(script+"; touch "+dir+"/started; exec sleep 60", func(j *workspace.Job) {
		j.Mounts = []sandbox.Mount{{Source: dir, Target: dir}}
	}))
	var signal sandbox.SignalError
	require.ErrorAs(b, err, &signal)
}

func TestAnInterruptedRunIsContinued(t *testing.T) {
	forDrivers(t, func(b *bench) {
		b.write("a", "1")
		b.write("b", "1")
		b.interrupt("echo 1 > product")
		require.NoError(b, os.Remove(filepath.Join(b.src, "b")))
		res := b.run("ls")
		require.Equal(b, []string{"interrupted"}, res.Why)
		require.Equal(b, "a\nproduct\n", b.stdout.String(), "what only the interrupted run brought is mirrored, too")

		b.look(func(m *cache.Manager) {
			imm, err := m.Get(b.ctx, res.ID, cache.GetOptions{})
			require.NoError(b, err)
			require.NoError(b, errors.Join(imm.Finalize(b.ctx), imm.Release(b.ctx)))
		})
		b.write("c", "1")
		b.interrupt("echo 2 > product")
		require.NoError(b, os.Remove(filepath.Join(b.src, "c")))
		res = b.run("ls; cat product")
		require.Equal(b, []string{"interrupted"}, res.Why, "the child is continued, no second one is made")
		require.Equal(b, "a\nproduct\n2\n", b.stdout.String())
		b.look(func(m *cache.Manager) {
			u, err := m.DiskUsage(b.ctx, nil)
			require.NoError(b, err)
			require.EqualValues(b, 2, u.Records)
		})
	})
}

// Runs of different keys meet each other: each waits for what the other makes.
func TestDifferentKeysRunAtTheSameTime(t *testing.T) {
	b := newBench(t, "overlay")
	dir := t.TempDir()
	var wg sync.WaitGroup
	for _, names := range [][2]string{{"x", "y"}, {"y", "x"}} {
		wg.Go(func() {
			script := fmt.Sprintf("touch %[1]s/%[2]s; n=0; while [ ! -e %[1]s/%[3]s ]; do n=$((n+1)); [ $n -lt 3000 ] || exit 1; sleep 0.01; done", dir, names[0], names[1])
			j := b.job(script, func(j *workspace.Job) {
				j.Key = names[0]
				j.Mounts = []sandbox.Mount{{Source: dir, Target: dir}}
			})
			j.Stdout, j.Stderr = &bytes.Buffer{}, &bytes.Buffer{}
			res, err := workspace.Run(b.ctx, j)
			if err != nil || res.ExitCode != 0 {
				t.Errorf("%s: %+v, %v", names[0], res, err)
			}
		})
	}
	wg.Wait()
}

func TestTheSecondRunOfAKeyWaits(t *testing.T) {
	b := newBench(t, "overlay")
	b.write("a", "1")
	dir := t.TempDir()
	mounted := func(j *workspace.Job) { j.Mounts = []sandbox.Mount{{Source: dir, Target: dir}} }
	script := fmt.Sprintf("touch %[1]s/started; while [ ! -e %[1]s/go ]; do sleep 0.01; done; echo done >> log; cat log", dir)
	go1 := func(err *error, res *workspace.Result, onWait func(cache.Holder)) {
		j := b.job(script, mounted)
		j.Stdout, j.Stderr, j.OnWait = &bytes.Buffer{}, &bytes.Buffer{}, onWait
		*res, *err = workspace.Run(b.ctx, j)
	}
	var errs [2]error
	var results [2]workspace.Result
	var wg sync.WaitGroup
	wg.Go(func() { go1(&errs[0], &results[0], nil) })
	for {
		if _, err := os.Stat(filepath.Join(dir, "started")); err == nil {
			break
		}
	}
	_, err := workspace.Run(b.ctx, b.job(script, mounted, func(j *workspace.Job) { j.NoWait = true }))
	require.ErrorIs(t, err, cache.ErrLocked)
	require.ErrorContains(t, err, fmt.Sprint(os.Getpid()))

	waits := make(chan cache.Holder, 100)
	wg.Go(func() { go1(&errs[1], &results[1], func(h cache.Holder) { waits <- h }) })
	holder := <-waits
	require.Equal(t, os.Getpid(), holder.PID)
	require.NotEmpty(t, holder.Command)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go"), nil, 0o644))
	wg.Wait()
	require.NoError(t, errors.Join(errs[:]...))
	require.False(t, results[0].Cached)
	require.True(t, results[1].Cached, "the first one made what the second wanted")
	require.Equal(t, results[0].ID, results[1].ID)
}

func TestTheWorkspaceIsAlwaysAtTheSamePath(t *testing.T) {
	forDrivers(t, func(b *bench) {
		b.run("pwd; echo $PWD")
		where := b.stdout.String()
		b.write("a", "1")
		b.run("pwd; echo $PWD")
		require.Equal(b, where, b.stdout.String())
		require.True(b, strings.HasPrefix(where, b.root))
	})
}

func TestWithoutASource(t *testing.T) {
	b := newBench(t, "overlay")
	none := func(j *workspace.Job) { j.Source = "" }
	b.interrupt("echo 1 > product")
	b.run("cat product", none)
	require.Equal(t, "1\n", b.stdout.String())
	other := func(j *workspace.Job) { j.Source, j.Key = "", "other" }
	require.NoError(t, os.RemoveAll(filepath.Join(b.root, "workspaces")))
	require.Equal(t, []string{"first"}, b.run("ls", other).Why)
	require.True(t, b.run("ls", other).Cached)
}

// A file that is still open when the command has ended, as those of a process
// that was just killed can be, is waited for.
func TestUnmountWaitsForOpenFiles(t *testing.T) {
	b := newBench(t, "overlay")
	b.look(func(m *cache.Manager) {
		mut, err := m.New(b.ctx, nil, cache.NewOptions{})
		require.NoError(t, err)
		mnt, err := mut.Mount(b.ctx, cache.MountOptions{})
		require.NoError(t, err)
		f, err := os.Create(filepath.Join(mnt.Path(), "open"))
		require.NoError(t, err)
		require.ErrorIs(t, mnt.Unmount(), syscall.EBUSY)
		done := make(chan error)
		go func() { done <- workspace.Unmount(mnt) }()
		require.NoError(t, f.Close())
		require.NoError(t, <-done)
		require.NoError(t, mut.Release(b.ctx))
	})
}

func TestBadJobs(t *testing.T) {
	b := newBench(t, "overlay")
	file := filepath.Join(b.src, "file")
	b.write("file", "")
	for name, c := range map[string]struct {
		change func(*workspace.Job)
		class  error
	}{
		"no key":         {func(j *workspace.Job) { j.Key = "" }, errdefs.ErrInvalidArgument},
		"a long key":     {func(j *workspace.Job) { j.Key = strings.Repeat("k", 5000) }, errdefs.ErrInvalidArgument},
		"no command":     {func(j *workspace.Job) { j.Args = nil }, errdefs.ErrInvalidArgument},
		"no source":      {func(j *workspace.Job) { j.Source = b.src + "/none" }, errdefs.ErrNotFound},
		"a file":         {func(j *workspace.Job) { j.Source = file }, errdefs.ErrInvalidArgument},
		"a bad pattern":  {func(j *workspace.Job) { j.Exclude = []string{"[a"} }, errdefs.ErrInvalidArgument},
		"no ignored var": {func(j *workspace.Job) { j.IgnoreEnv = []string{""} }, errdefs.ErrInvalidArgument},
	} {
		_, err := workspace.Run(b.ctx, b.job("true", c.change))
		require.ErrorIs(t, err, c.class, name)
		require.NoDirExists(t, b.root, "%s: nothing is made", name)
	}
	for _, key := range []string{"..", "a/b", "\x00", "\xff", strings.Repeat("k", 1024), ".hidden", "key-x", " "} {
		res := b.run("pwd", func(j *workspace.Job) { j.Key = key })
		require.Equal(t, 0, res.ExitCode, "%q", key)
		require.Equal(t, filepath.Join(b.root, "workspaces"), filepath.Dir(strings.TrimSpace(b.stdout.String())))
		require.True(t, b.run("pwd", func(j *workspace.Job) { j.Key = key }).Cached, "%q", key)
	}
}
