package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

const (
	// chunkSize is what is read, hashed and parsed at a time: large enough
	// that handing it over costs nothing, small enough to stay in the cache.
	chunkSize = 256 << 10
	// chunks are how many may be under way, so how far reading is ahead.
	chunks = 8
)

// chunk is a piece of the stream that two goroutines read.
type chunk struct {
	data []byte
	refs atomic.Int32
}

// stream reads r ahead in one goroutine, hashes it in another and is itself
// the reader of the same bytes for the caller. So decompressing, which happens
// in r, hashing, and making files overlap. A reader that knows what it holds
// is not hashed a second time.
type stream struct {
	data, toHash, free chan *chunk
	stop               chan struct{}
	stopOnce           sync.Once
	wg                 sync.WaitGroup
	sum                hash.Hash
	known              digest.Digest // what r is held against, if it is

	// Of the reader's goroutine until data is closed.
	err  error
	size int64

	// Of the caller.
	current *chunk
	rest    []byte
	done    bool
}

// startStream starts reading. close has to be called.
func startStream(ctx context.Context, r io.Reader, limit int64) *stream {
	s := &stream{
		data: make(chan *chunk, chunks), toHash: make(chan *chunk, chunks), free: make(chan *chunk, chunks),
		stop: make(chan struct{}), sum: sha256.New(),
	}
	if v, ok := r.(*verbatim); ok {
		s.known = v.diffID()
	}
	s.wg.Go(func() { s.readAll(ctx, r, limit) })
	if s.known != "" {
		return s
	}
	s.wg.Go(func() {
		for c := range s.toHash {
			s.sum.Write(c.data)
			s.release(c)
		}
	})
	return s
}

func (s *stream) readAll(ctx context.Context, r io.Reader, limit int64) {
	defer close(s.data)
	defer close(s.toHash)
	made := 0
	for {
		var c *chunk
		select {
		case c = <-s.free:
		case <-s.stop:
			return
		default:
			if made < chunks {
				c = &chunk{data: make([]byte, chunkSize)}
				made++
				break
			}
			select {
			case c = <-s.free:
			case <-s.stop:
				return
			}
		}
		if err := context.Cause(ctx); err != nil {
			s.err = err
			return
		}
		n, err := fill(r, c.data[:chunkSize])
		c.data = c.data[:n]
		s.size += int64(n)
		if s.size > limit {
			s.err = exhausted("the layer is longer than %d bytes", limit)
			return
		}
		if n > 0 {
			c.refs.Store(1)
			if s.known == "" {
				c.refs.Store(2)
				s.toHash <- c // never blocks: there are no more chunks than it holds
			}
			s.data <- c
		}
		if err != nil {
			if err != io.EOF { //nolint:errorlint // the end is io.EOF itself, as of every reader
				s.err = err
			}
			return
		}
	}
}

// fill reads until p is full. Unlike io.ReadFull it returns the reader's own
// error: of a compressed stream that was cut off that is ErrUnexpectedEOF.
func fill(r io.Reader, p []byte) (n int, err error) {
	for idle := 0; n < len(p); {
		m, err := r.Read(p[n:])
		n += m
		if err != nil {
			return n, err
		}
		if m > 0 {
			idle = 0
		} else if idle++; idle == 100 {
			return n, io.ErrNoProgress
		}
	}
	return n, nil
}

func (s *stream) release(c *chunk) {
	if c.refs.Add(-1) == 0 {
		s.free <- c
	}
}

// Read implements io.Reader for the one goroutine of the caller.
func (s *stream) Read(p []byte) (int, error) {
	for len(s.rest) == 0 {
		if err := s.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *stream) next() error {
	if s.current != nil {
		s.release(s.current)
		s.current = nil
	}
	c, ok := <-s.data
	if !ok {
		s.done = true
		if s.err != nil {
			return s.err
		}
		return io.EOF
	}
	s.current, s.rest = c, c.data
	return nil
}

// failure is the error of the stream's reader, once Read has met it.
func (s *stream) failure() error {
	if s.done {
		return s.err
	}
	return nil
}

// finish reads what is left and returns digest and length of it all.
func (s *stream) finish() (digest.Digest, int64, error) {
	s.rest = nil
	for {
		if err := s.next(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return "", 0, err
		}
	}
	s.close()
	if s.known != "" {
		return s.known, s.size, nil
	}
	return digest.NewDigest(digest.SHA256, s.sum), s.size, nil
}

// close stops reading and waits until nobody reads any more.
func (s *stream) close() {
	s.stopOnce.Do(func() { close(s.stop) })
	s.wg.Wait()
}
