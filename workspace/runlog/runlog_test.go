package runlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// clock moves by assignment.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func newWriter(t testing.TB, o Options) *Writer {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	w, err := NewWriter(o)
	require.NoError(t, err)
	return w
}

func finish(t testing.TB, w *Writer) []byte {
	t.Helper()
	log, err := w.Finish()
	require.NoError(t, err)
	return log
}

func replay(t testing.TB, log []byte) (stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	require.NoError(t, Replay(log, &out, &err))
	return out.String(), err.String()
}

func TestEmptyLog(t *testing.T) {
	log := finish(t, newWriter(t, Options{}))
	out, err := replay(t, log)
	require.Empty(t, out)
	require.Empty(t, err)
}

func TestOrderStreamsAndTimes(t *testing.T) {
	c := &clock{now: time.Unix(1000, 0)}
	w := newWriter(t, Options{Now: c.Now})
	write := func(stream Stream, after time.Duration, text string) {
		c.now = c.now.Add(after)
		dst := w.Stdout()
		if stream == Stderr {
			dst = w.Stderr()
		}
		n, err := fmt.Fprint(dst, text)
		require.NoError(t, err)
		require.Equal(t, len(text), n)
	}
	write(Stdout, 3*time.Millisecond, "one\n")
	write(Stderr, time.Hour, "two\x00\xff")
	write(Stdout, -time.Minute, "three") // the clock was set back
	write(Stderr, time.Second, "")       // writes nothing
	write(Stdout, time.Microsecond, "four")

	type chunk struct {
		Stream Stream
		Offset time.Duration
		Data   string
	}
	var got []chunk
	for c, err := range Chunks(finish(t, w)) {
		require.NoError(t, err)
		got = append(got, chunk{c.Stream, c.Offset, string(c.Data)})
	}
	at := time.Hour + 3*time.Millisecond
	require.Equal(t, []chunk{
		{Stdout, 3 * time.Millisecond, "one\n"},
		{Stderr, at, "two\x00\xff"},
		{Stdout, at, "three"},
		{Stdout, at + time.Second + time.Microsecond, "four"},
	}, got)
}

// TestAnyOutputComesBack compares a log with what was written, whatever the
// sizes of the writes.
func TestAnyOutputComesBack(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWriter(t, Options{})
		var want [3]bytes.Buffer
		for range rapid.IntRange(0, 30).Draw(rt, "writes") {
			data := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(rt, "data")
			data = bytes.Repeat(data, rapid.SampledFrom([]int{1, 2, 1000, 3000}).Draw(rt, "times"))
			if rapid.Bool().Draw(rt, "stderr") {
				want[Stderr].Write(data)
				_, _ = w.Stderr().Write(data)
			} else {
				want[Stdout].Write(data)
				_, _ = w.Stdout().Write(data)
			}
		}
		out, err := replay(t, finish(t, w))
		require.True(rt, want[Stdout].String() == out, "stdout differs")
		require.True(rt, want[Stderr].String() == err, "stderr differs")
	})
}

// TestLongLogLeavesMemory writes what does not compress, far beyond what stays
// in memory, and looks for it in an unnamed file.
func TestLongLogLeavesMemory(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, Options{Dir: dir})
	noise := make([]byte, 3<<20)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(noise)
	for part := range slices.Chunk(noise, 100_000) {
		_, _ = w.Stdout().Write(part)
	}
	require.NotNil(t, w.sink.file, "nothing was spilled")
	require.LessOrEqual(t, w.sink.buf.Cap(), 2*spillAt)
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, names, "a kill would leave a file behind")
	out, _ := replay(t, finish(t, w))
	require.True(t, string(noise) == out, "output differs")
}

func TestTooLongLogIsCutAndSaysSo(t *testing.T) {
	w := newWriter(t, Options{MaxSize: 64 << 10})
	noise := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(noise)
	for part := range slices.Chunk(noise, 10_000) {
		_, _ = w.Stdout().Write(part)
	}
	_, _ = w.Stderr().Write([]byte("the last word"))
	log := finish(t, w)
	dropped, err := Dropped(log)
	require.NoError(t, err)
	require.Positive(t, dropped)
	out, stderr := replay(t, log)
	require.Equal(t, uint64(len(noise)+len("the last word")), dropped+uint64(len(out)))
	require.True(t, strings.HasPrefix(string(noise), out), "the beginning differs")
	require.Contains(t, stderr, fmt.Sprint(dropped))
	require.Less(t, len(log), 600<<10)
}

// TestFullDiskDoesNotStopTheCommand takes the directory of the file away.
func TestFullDiskDoesNotStopTheCommand(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, Options{Dir: dir})
	require.NoError(t, os.RemoveAll(dir))
	noise := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(noise)
	for range 3 {
		n, err := w.Stdout().Write(noise)
		require.NoError(t, err)
		require.Equal(t, len(noise), n)
	}
	_, err := w.Finish()
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestSeveralGoroutines(t *testing.T) {
	w := newWriter(t, Options{})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			dst := w.Stdout()
			if g%2 == 1 {
				dst = w.Stderr()
			}
			for i := range 200 {
				_, _ = fmt.Fprintf(dst, "%d:%d\n", g, i)
			}
		})
	}
	wg.Wait()
	out, stderr := replay(t, finish(t, w))
	next := map[int]int{}
	for _, line := range strings.Fields(out + stderr) {
		var g, i int
		_, err := fmt.Sscanf(line, "%d:%d", &g, &i)
		require.NoError(t, err, line)
		require.Equal(t, next[g], i)
		next[g]++
	}
	for g := range 8 {
		require.Equal(t, 200, next[g])
	}
}

func TestEndings(t *testing.T) {
	w := newWriter(t, Options{})
	_, _ = w.Stdout().Write([]byte("x"))
	require.NoError(t, w.Close())
	require.NoError(t, w.Close())
	_, err := w.Finish()
	require.Error(t, err)

	w = newWriter(t, Options{})
	finish(t, w)
	require.NoError(t, w.Close())
	_, _ = w.Stdout().Write([]byte("too late")) // must not panic
}

// forge makes a log of any chunk bytes.
func forge(kept uint64, chunks []byte) []byte {
	enc, err := zstd.NewWriter(nil, zstd.WithWindowSize(window))
	if err != nil {
		panic(err)
	}
	log := append([]byte(magic), version)
	log = binary.AppendUvarint(log, kept)
	log = binary.AppendUvarint(log, 0)
	return enc.EncodeAll(chunks, log)
}

func TestHostileLogs(t *testing.T) {
	good := forge(2, []byte{1, 0, 2, 'h', 'i'})
	out, _ := replay(t, good)
	require.Equal(t, "hi", out)
	for name, log := range map[string][]byte{
		"empty":              {},
		"other file":         []byte("#!/bin/sh\n"),
		"magic only":         []byte(magic),
		"header cut":         append([]byte(magic), version, 0x80),
		"no body":            append([]byte(magic), version, 2, 0),
		"cut":                good[:len(good)-1],
		"stream 0":           forge(2, []byte{0, 0, 2, 'h', 'i'}),
		"stream 3":           forge(2, []byte{3, 0, 2, 'h', 'i'}),
		"no data":            forge(2, []byte{1, 0, 2, 'h'}),
		"empty chunk":        forge(0, []byte{1, 0, 0}),
		"huge chunk":         forge(1<<62, binary.AppendUvarint([]byte{1, 0}, 1<<60)),
		"more than it says":  forge(1, []byte{1, 0, 1, 'h', 1, 0, 1, 'i'}),
		"less than it says":  forge(3, []byte{1, 0, 2, 'h', 'i'}),
		"endless pause":      forge(2, append(binary.AppendUvarint([]byte{1}, 1<<63), 2, 'h', 'i')),
		"overlong varint":    forge(2, append([]byte{1}, bytes.Repeat([]byte{0xff}, 20)...)),
		"a bomb of one byte": forge(1, make([]byte, 64<<20)),
	} {
		t.Run(name, func(t *testing.T) {
			var out, stderr bytes.Buffer
			err := Replay(log, &out, &stderr)
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
		})
	}
	newer := append([]byte(magic), version+1, 0, 0)
	require.ErrorIs(t, Replay(newer, &bytes.Buffer{}, &bytes.Buffer{}), errdefs.ErrNotImplemented)
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errBroken }

var errBroken = errors.New("broken pipe")

func TestReplayStopsWithItsReader(t *testing.T) {
	log := forge(2, []byte{1, 0, 2, 'h', 'i'})
	require.ErrorIs(t, Replay(log, brokenPipe{}, &bytes.Buffer{}), errBroken)
	for range Chunks(log) {
		break // must not call again
	}
}

// TestEveryFlippedByteIsNoticed changes each byte of a small log.
func TestEveryFlippedByteIsNoticed(t *testing.T) {
	w := newWriter(t, Options{Now: (&clock{now: time.Unix(0, 0)}).Now})
	_, _ = w.Stdout().Write([]byte("compiling...\n"))
	_, _ = w.Stderr().Write([]byte("warning\n"))
	log := finish(t, w)
	silent := 0
	for i := range log {
		for bit := range 8 {
			bad := slices.Clone(log)
			bad[i] ^= 1 << bit
			var out, stderr bytes.Buffer
			if err := Replay(bad, &out, &stderr); err == nil && (out.String() != "compiling...\n" || stderr.String() != "warning\n") {
				silent++
			}
		}
	}
	// The count of dropped bytes is the one thing that nothing else tells:
	// it only adds a line.
	require.LessOrEqual(t, silent, 7)
}

func FuzzReplay(f *testing.F) {
	f.Add([]byte{})
	f.Add(forge(2, []byte{1, 0, 2, 'h', 'i'}))
	f.Add(forge(1, make([]byte, 4096)))
	f.Fuzz(func(t *testing.T, log []byte) {
		var out counter
		kept, _, _, herr := header(log)
		err := Replay(log, &out, new(counter))
		if herr != nil && err == nil {
			t.Fatal("a log without a header was replayed")
		}
		if uint64(out) > kept {
			t.Fatalf("%d bytes came out of a log that says %d", out, kept)
		}
	})
}

type counter uint64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}
