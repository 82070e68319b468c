package runlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

const (
	magic   = "LRUN"
	version = 1
	// maxChunk is the longest chunk, in bytes: what a pipe holds on Linux.
	// A longer write becomes several chunks.
	maxChunk = 64 << 10
	// window is how far back zstd looks, and so what reading and writing
	// cost in memory. Logs repeat themselves line by line, not by megabytes.
	window = 1 << 20
	// spillAt is how much of a compressed log stays in memory. Nearly all
	// logs are shorter.
	spillAt = 256 << 10
)

// DefaultMaxSize is how long a log may become, compressed, in bytes. Compilers
// print a tenth of a percent of that; what prints more is a runaway loop, and
// would only bloat the store.
const DefaultMaxSize = 64 << 20

// Options of NewWriter; the zero value is good.
type Options struct {
	// Dir is where a long log waits in a file without a name; empty is the
	// system's directory for temporary files.
	Dir string
	// MaxSize is how long the log may become, in compressed bytes, within
	// some hundred kilobytes; DefaultMaxSize if zero. What comes after that
	// is counted, not kept.
	MaxSize int64
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Writer takes a log. Its methods, and those of its two writers, may be called
// by several goroutines at once.
type Writer struct {
	dir string
	max int64
	now func() time.Time

	mu sync.Mutex
	// Guarded by mu.
	enc     *zstd.Encoder
	sink    sink
	last    time.Time
	kept    uint64
	dropped uint64
	err     error // why the log is lost; output goes on
	done    bool
}

// NewWriter begins a log. Its clock starts now. End it with Finish or Close.
func NewWriter(o Options) (*Writer, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxSize == 0 {
		o.MaxSize = DefaultMaxSize
	}
	w := &Writer{dir: o.Dir, max: o.MaxSize, now: o.Now}
	w.sink.dir = o.Dir
	var err error
	w.enc, err = zstd.NewWriter(&w.sink,
		zstd.WithEncoderConcurrency(1), // no goroutines of its own
		zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithWindowSize(window))
	if err != nil {
		return nil, fmt.Errorf("begin log: %w", err)
	}
	w.last = w.now()
	return w, nil
}

// Stdout is where standard output goes. Its Write never fails: a log that
// cannot be kept must not stop the command. Finish tells.
func (w *Writer) Stdout() io.Writer { return stream{w, Stdout} }

// Stderr is where standard error goes; see Stdout.
func (w *Writer) Stderr() io.Writer { return stream{w, Stderr} }

type stream struct {
	w    *Writer
	kind Stream
}

func (s stream) Write(p []byte) (int, error) {
	s.w.append(s.kind, p)
	return len(p), nil
}

func (w *Writer) append(kind Stream, p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(p) > 0 {
		n := min(len(p), maxChunk)
		w.chunk(kind, p[:n])
		p = p[n:]
	}
}

// chunk writes one chunk. The caller holds mu.
func (w *Writer) chunk(kind Stream, p []byte) {
	if w.done || w.err != nil || w.dropped > 0 || w.sink.size >= w.max {
		w.dropped += uint64(len(p))
		return
	}
	// The clock may have been set back.
	now := w.now()
	pause := max(0, now.Sub(w.last))
	w.last = now
	head := make([]byte, 1, 1+2*binary.MaxVarintLen64)
	head[0] = byte(kind)
	head = binary.AppendUvarint(head, uint64(pause.Microseconds()))
	head = binary.AppendUvarint(head, uint64(len(p)))
	for _, part := range [][]byte{head, p} {
		if _, err := w.enc.Write(part); err != nil {
			w.err = err
			return
		}
	}
	w.kept += uint64(len(p))
}

// Finish ends the log and returns it. What is written after that is dropped.
// If the log was lost on the way, the error says why.
func (w *Writer) Finish() (log []byte, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return nil, errors.New("the log has ended already")
	}
	w.done = true
	defer func() { err = errors.Join(err, w.sink.close()) }()
	if err := errors.Join(w.err, w.enc.Close()); err != nil {
		return nil, fmt.Errorf("keep the log: %w", err)
	}
	log = append([]byte(magic), version)
	log = binary.AppendUvarint(log, w.kept)
	log = binary.AppendUvarint(log, w.dropped)
	if log, err = w.sink.appendTo(log); err != nil {
		return nil, fmt.Errorf("keep the log: %w", err)
	}
	return log, nil
}

// Close gives up a log that was not finished. After Finish it does nothing.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return nil
	}
	w.done = true
	w.enc.Reset(nil)
	return w.sink.close()
}

// sink keeps compressed bytes, in memory at first.
type sink struct {
	dir  string
	size int64
	buf  bytes.Buffer
	file *os.File
}

func (s *sink) Write(p []byte) (int, error) {
	s.size += int64(len(p))
	if s.file == nil && s.buf.Len()+len(p) <= spillAt {
		return s.buf.Write(p)
	}
	if s.file == nil {
		f, err := os.CreateTemp(s.dir, "lamina-log-")
		if err != nil {
			return 0, err
		}
		s.file = f
		// Without a name nobody has to remove it after a kill.
		if err := os.Remove(f.Name()); err != nil {
			return 0, err
		}
	}
	return s.file.Write(p)
}

// appendTo appends all that was written to log.
func (s *sink) appendTo(log []byte) ([]byte, error) {
	log = append(log, s.buf.Bytes()...)
	if s.file == nil {
		return log, nil
	}
	rest := s.size - int64(s.buf.Len())
	at := len(log)
	log = append(log, make([]byte, rest)...)
	_, err := io.ReadFull(io.NewSectionReader(s.file, 0, rest), log[at:])
	return log, err
}

func (s *sink) close() error {
	if s.file == nil {
		return nil
	}
	f := s.file
	s.file = nil
	return f.Close()
}
