package layer

import (
	"crypto/sha256"
	"hash"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// sink hands what is written to another goroutine, which hashes it and passes
// it on to w. So reading files overlaps with hashing and compressing them.
type sink struct {
	full, free chan []byte
	ended      chan struct{}
	failed     atomic.Bool
	closed     bool
	buf        []byte
	size       int64

	// Of the goroutine until ended is closed.
	sum hash.Hash
	err error
}

// startSink starts a sink. close has to be called.
func startSink(w io.Writer) *sink {
	s := &sink{full: make(chan []byte, chunks), free: make(chan []byte, chunks), ended: make(chan struct{}), sum: sha256.New()}
	for range chunks - 1 {
		s.free <- make([]byte, 0, chunkSize)
	}
	s.buf = make([]byte, 0, chunkSize)
	go func() {
		defer close(s.ended)
		for b := range s.full {
			if s.err == nil {
				s.sum.Write(b)
				if _, s.err = w.Write(b); s.err != nil {
					s.failed.Store(true)
				}
			}
			s.free <- b[:0]
		}
	}()
	return s
}

// Write implements io.Writer. Its error may be of an earlier call.
func (s *sink) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		if s.failed.Load() {
			return 0, s.close()
		}
		n := copy(s.buf[len(s.buf):cap(s.buf)], rest)
		s.buf, rest = s.buf[:len(s.buf)+n], rest[n:]
		if len(s.buf) == cap(s.buf) {
			s.full <- s.buf
			s.buf = <-s.free
		}
	}
	s.size += int64(len(p))
	return len(p), nil
}

// close passes on what is left and returns the error of w. It may be called
// again; what is written afterwards is lost.
func (s *sink) close() error {
	if !s.closed {
		s.closed = true
		s.full <- s.buf
		s.buf = make([]byte, 0, chunkSize)
		close(s.full)
	}
	<-s.ended
	return s.err
}

// digest is of all that was written, after close.
func (s *sink) digest() digest.Digest { return digest.NewDigest(digest.SHA256, s.sum) }
