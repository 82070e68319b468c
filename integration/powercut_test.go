package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
)

// disk is a file system of its own on a loop device, whose power can be cut.
type disk struct {
	testing.TB
	image, dir string
	kind       string
}

// newDisk makes a file system of this kind, or skips with the reason.
func newDisk(t testing.TB, kind string, size int64) *disk {
	mkfs, err := exec.LookPath("mkfs." + kind)
	if err != nil {
		t.Skipf("needs mkfs.%s: %v", kind, err)
	}
	d := &disk{TB: t, kind: kind, image: filepath.Join(t.TempDir(), "image"), dir: t.TempDir()}
	f, err := os.Create(d.image)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(size))
	require.NoError(t, f.Close())
	out, err := exec.Command(mkfs, "-q", d.image).CombinedOutput()
	require.NoError(t, err, "%s", out)
	d.mount()
	t.Cleanup(d.unmount)
	return d
}

func (d *disk) mount() {
	d.Helper()
	if out, err := exec.Command("mount", "-o", "loop", d.image, d.dir).CombinedOutput(); err != nil {
		if d.kind != "ext4" && unix.Access("/sys/fs/"+d.kind, unix.F_OK) != nil {
			d.Skipf("cannot mount %s here: %s", d.kind, out)
		}
		if unix.Access("/dev/loop-control", unix.F_OK) != nil {
			d.Skipf("there are no loop devices here: %s", out)
		}
		require.NoError(d, err, "%s", out)
	}
}

func (d *disk) unmount() {
	d.Helper()
	// What a process that went down with the machine had mounted below.
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(d.dir))
	require.NoError(d, err)
	for _, m := range slices.Backward(mounts) {
		if m.Mountpoint != d.dir {
			require.NoError(d, unix.Unmount(m.Mountpoint, unix.MNT_DETACH))
		}
	}
	require.NoError(d, unix.Unmount(d.dir, 0))
}

// inOwnMounts says whether the test runs in a mount namespace of its own. If
// not it runs the test again in a process that has one, and is done: sandboxes
// of other tests copy all mounts that they see, and a file system whose power
// is to be cut must not live on in a copy.
func inOwnMounts(t *testing.T) bool {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a loop device")
	}
	const marker = "LAMINA_TEST_OWN_MOUNTS"
	if os.Getenv(marker) != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), marker+"=1", "LAMINA_TEST_BINARY="+laminaBinary)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the thread that forks must live as long as the child
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	require.NoError(t, err)
	if bytes.Contains(out, []byte("--- SKIP: "+t.Name())) {
		t.Skip("the process with mounts of its own skipped it, see above")
	}
	return false
}

// cut takes the power away: what is not on the disk by now is lost, the log's
// last entries, too. Then the machine comes up again.
func (d *disk) cut() {
	d.Helper()
	f, err := os.Open(d.dir)
	require.NoError(d, err)
	const (
		shutdown   = 0x8004587d // FS_IOC_SHUTDOWN, _IOR('X', 125, __u32)
		noLogFlush = 2          // FS_SHUTDOWN_FLAGS_NOLOGFLUSH
	)
	flags := uint32(noLogFlush)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags)))
	require.NoError(d, f.Close())
	if errno != 0 {
		d.Skipf("this kernel cannot shut %s down: %v", d.kind, errno)
	}
	d.unmount()
	d.mount()
}

// pattern is content that is recognised, whatever is lost of it.
func pattern(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, seed))
	data := make([]byte, 1+seed%50_000)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return data
}

// promise is a record that was acknowledged.
type promise struct {
	seed    uint64
	durable bool
}

// powerRig makes records on a disk and cuts its power at random moments.
type powerRig struct {
	*disk
	rand *rand.Rand
	boot int
	all  map[cache.ID]promise
	// torn counts records that were served with other content than they had.
	torn, lost, kept int
}

func optionsOn(dir string, boot int) cache.Options {
	return cache.Options{Root: filepath.Join(dir, "store"), BootID: fmt.Sprintf("boot %d", boot), SyncInterval: -1}
}

func openOn(t testing.TB, dir string, boot int) *cache.Manager {
	t.Helper()
	m, err := cache.Open(context.Background(), optionsOn(dir, boot))
	require.NoError(t, err)
	return m
}

// acknowledged is one line of what the working process tells the rig.
type acknowledged struct {
	// ID was committed with the content of Seed.
	ID   cache.ID
	Seed uint64
	// Gone says that ID is not found any more.
	Gone bool
	// Synced says that all that is committed is durable.
	Synced bool
}

const powerWorkEnv = "LAMINA_TEST_POWER_WORK"

type powerWork struct {
	Dir   string
	Boot  int
	Seed  uint64
	Clean bool
}

// TestPowerWork is the process that works on the disk until it ends, with the
// store closed or not. It is run by the rig only.
func TestPowerWork(t *testing.T) {
	text := os.Getenv(powerWorkEnv)
	if text == "" {
		t.Skip("run by the power cut tests")
	}
	var w powerWork
	require.NoError(t, json.Unmarshal([]byte(text), &w))
	ctx := context.Background()
	random := rand.New(rand.NewPCG(w.Seed, 1))
	out := json.NewEncoder(os.NewFile(3, "acknowledged"))
	tell := func(a acknowledged) { require.NoError(t, out.Encode(a)) }
	m := openOn(t, w.Dir, w.Boot)
	var refs []*cache.ImmutableRef
	seeds := map[cache.ID]uint64{}
	for range 2 + random.IntN(6) {
		var parent *cache.ImmutableRef
		if len(refs) > 0 && random.IntN(2) == 0 {
			parent = refs[random.IntN(len(refs))]
		}
		seed := random.Uint64()
		mut, err := m.New(ctx, parent, cache.NewOptions{Retain: random.IntN(3) == 0})
		require.NoError(t, err)
		mnt, err := mut.Mount(ctx, cache.MountOptions{})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(mnt.Path(), "data"), pattern(seed), 0o644))
		require.NoError(t, mnt.Unmount())
		imm, err := mut.Commit(ctx)
		require.NoError(t, err)
		seeds[imm.ID()] = seed
		tell(acknowledged{ID: imm.ID(), Seed: seed})
		refs = append(refs, imm)
		if random.IntN(3) == 0 {
			require.NoError(t, imm.Finalize(ctx))
		}
		if random.IntN(4) == 0 {
			_, err := m.Sync(ctx)
			require.NoError(t, err)
			tell(acknowledged{Synced: true})
		}
	}
	// A record that was durable is not any more once its snapshot could
	// change.
	last := refs[len(refs)-1]
	refs = refs[:len(refs)-1]
	require.NoError(t, last.Release(ctx))
	if mut, err := m.GetMutable(ctx, last.ID()); err == nil {
		tell(acknowledged{ID: last.ID(), Gone: true})
		imm, err := mut.Commit(ctx)
		require.NoError(t, err)
		tell(acknowledged{ID: imm.ID(), Seed: seeds[last.ID()]})
		refs = append(refs, imm)
	}
	if !w.Clean {
		os.Exit(0) // the machine goes down with the store open
	}
	for _, ref := range refs {
		require.NoError(t, ref.Release(ctx))
	}
	require.NoError(t, m.Close())
}

// work runs TestPowerWork in a process of its own and notes what it
// acknowledges.
func (r *powerRig) work(clean bool) {
	r.Helper()
	text, err := json.Marshal(powerWork{Dir: r.dir, Boot: r.boot, Seed: r.rand.Uint64(), Clean: clean})
	require.NoError(r, err)
	read, write, err := os.Pipe()
	require.NoError(r, err)
	cmd := exec.Command(os.Args[0], "-test.run=^TestPowerWork$")
	cmd.Env = append(os.Environ(), powerWorkEnv+"="+string(text), "LAMINA_TEST_BINARY="+laminaBinary)
	cmd.ExtraFiles = []*os.File{write}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	require.NoError(r, cmd.Start())
	require.NoError(r, write.Close())
	for in := json.NewDecoder(read); ; {
		var a acknowledged
		if err := in.Decode(&a); errors.Is(err, io.EOF) {
			break
		} else {
			require.NoError(r, err)
		}
		switch {
		case a.Synced:
			for id, p := range r.all {
				p.durable = true
				r.all[id] = p
			}
		case a.Gone:
			delete(r.all, a.ID)
		default:
			r.all[a.ID] = promise{seed: a.Seed}
		}
	}
	require.NoError(r, read.Close())
	require.NoError(r, cmd.Wait(), "%s", output.String())
}

// verify compares all promises with what is served after the cut.
func (r *powerRig) verify(m *cache.Manager) {
	r.Helper()
	ctx := context.Background()
	for id, p := range r.all {
		imm, err := m.Get(ctx, id, cache.GetOptions{})
		if errors.Is(err, errdefs.ErrNotFound) {
			require.False(r, p.durable, "record %s was durable and is gone", id)
			delete(r.all, id)
			r.lost++
			continue
		}
		require.NoError(r, err)
		if r.whole(imm, p) {
			r.kept++
		} else {
			r.torn++
		}
		require.NoError(r, imm.Release(ctx))
	}
}

// whole says whether a record is served with the content that it had.
func (r *powerRig) whole(imm *cache.ImmutableRef, p promise) bool {
	mnt, err := imm.Mount(context.Background())
	if err != nil {
		return false
	}
	defer func() { require.NoError(r, mnt.Unmount()) }()
	data, err := os.ReadFile(filepath.Join(mnt.Path(), "data"))
	return err == nil && bytes.Equal(data, pattern(p.seed))
}

// round works, takes the power away, and says in which boot to go on.
func (r *powerRig) round(nextBoot int) {
	r.Helper()
	// A clean Close says nothing about data.
	r.work(r.rand.IntN(2) == 0)
	r.cut()
	r.boot = nextBoot
}

func (r *powerRig) check(m *cache.Manager) {
	r.Helper()
	for f, err := range m.Check(context.Background()) {
		require.NoError(r, err)
		require.Fail(r, "finding after a power cut", "%+v", f)
	}
}

func newPowerRig(t *testing.T, kind string) *powerRig {
	seed := newSeed(t)
	return &powerRig{
		disk: newDisk(t, kind, 400<<20),
		rand: rand.New(rand.NewPCG(seed, 0)),
		all:  map[cache.ID]promise{},
	}
}

func TestPowerCuts(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	cuts := 40
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		cuts = 300
	}
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			r := newPowerRig(t, kind)
			for n := range cuts {
				r.round(r.boot + 1)
				m := openOn(r, r.dir, r.boot)
				r.verify(m)
				r.check(m)
				require.NoError(r, m.Close())
				if n%10 == 9 {
					// What has piled up takes longer to read each time.
					require.NoError(r, os.RemoveAll(filepath.Join(r.dir, "store")))
					clear(r.all)
				}
			}
			t.Logf("rig: %d power cuts of %s: %d records kept, %d lost, %d torn", cuts, kind, r.kept, r.lost, r.torn)
			require.Zero(t, r.torn, "records were served with other content")
			require.Positive(t, r.kept)
			require.Positive(t, r.lost)
		})
	}
}

// Without the mark of what was synced the same rig finds files whose data is
// gone: it would notice if the mark were not heeded. To take the next boot for
// the same one is to do without the mark.
func TestPowerCutsWithoutTheMark(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			r := newPowerRig(t, kind)
			// A cut tears what is served in one of five rounds or so.
			for range 500 {
				r.round(r.boot)
				m, err := cache.Open(context.Background(), optionsOn(r.dir, r.boot))
				if err != nil {
					// A driver may meet its own files empty, which is what
					// the rig is to notice, but the test wants to see it in
					// what is served.
					require.ErrorIs(t, err, errdefs.ErrDataLoss)
					require.NoError(t, os.RemoveAll(filepath.Join(r.dir, "store")))
					clear(r.all)
					continue
				}
				r.verify(m)
				require.NoError(t, m.Close())
				if r.torn > 0 {
					return
				}
			}
			require.Fail(t, "no record was torn")
		})
	}
}
