package runlog

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// Stream is one of a command's two outputs.
type Stream uint8

const (
	// Stdout is standard output.
	Stdout Stream = 1
	// Stderr is standard error.
	Stderr Stream = 2
)

// Chunk is what one write put out.
type Chunk struct {
	Stream Stream
	// Offset is the time since the log began.
	Offset time.Duration
	// Data holds until the next chunk is asked for.
	Data []byte
}

// damaged is an error about a log that is not what a Writer made.
func damaged(format string, args ...any) error {
	return fmt.Errorf("log is damaged: "+format+": %w", append(args, errdefs.ErrDataLoss)...)
}

// header reads what stands before the chunks.
func header(log []byte) (kept, dropped uint64, body []byte, err error) {
	body, ok := bytes.CutPrefix(log, []byte(magic))
	if !ok || len(body) == 0 {
		return 0, 0, nil, damaged("it does not begin like one")
	}
	if v := body[0]; v != version {
		return 0, 0, nil, fmt.Errorf("log has version %d, this program reads %d: %w", v, version, errdefs.ErrNotImplemented)
	}
	body = body[1:]
	for _, n := range []*uint64{&kept, &dropped} {
		v, size := binary.Uvarint(body)
		if size <= 0 {
			return 0, 0, nil, damaged("its header is cut")
		}
		*n, body = v, body[size:]
	}
	return kept, dropped, body, nil
}

// Dropped is the number of bytes that came after the log had become too long.
// Errors as for Chunks.
func Dropped(log []byte) (uint64, error) {
	_, dropped, _, err := header(log)
	return dropped, err
}

// Chunks yields what is in a log. An error ends it: DataLoss for a log that
// is damaged, NotImplemented for one of a newer version.
func Chunks(log []byte) iter.Seq2[Chunk, error] {
	return func(yield func(Chunk, error) bool) {
		stopped := false
		err := read(log, func(c Chunk) bool {
			stopped = !yield(c, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(Chunk{}, err)
		}
	}
}

// read calls each for every chunk until it says no.
func read(log []byte, each func(Chunk) bool) error {
	kept, _, body, err := header(log)
	if err != nil {
		return err
	}
	dec, err := zstd.NewReader(bytes.NewReader(body),
		zstd.WithDecoderConcurrency(1), // no goroutines of its own
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(window))
	if err != nil {
		return damaged("%v", err)
	}
	defer dec.Close()
	r := bufio.NewReader(dec)
	var offset time.Duration
	var buf []byte
	for seen := uint64(0); ; {
		kind, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			if seen != kept {
				return damaged("it has %d bytes of output, not %d", seen, kept)
			}
			return nil
		}
		if err != nil {
			return damaged("%v", err)
		}
		pause, length, err := chunkHead(r)
		switch {
		case err != nil:
			return damaged("%v", err)
		case Stream(kind) != Stdout && Stream(kind) != Stderr:
			return damaged("there is no stream %d", kind)
		case length == 0 || length > maxChunk || length > kept-seen:
			return damaged("a chunk has %d bytes", length)
		case pause > uint64((math.MaxInt64-offset)/time.Microsecond):
			return damaged("a pause of %d microseconds", pause)
		}
		offset += time.Duration(pause) * time.Microsecond
		if uint64(cap(buf)) < length {
			buf = make([]byte, max(length, 4<<10))
		}
		buf = buf[:length]
		if _, err := io.ReadFull(r, buf); err != nil {
			return damaged("%v", err)
		}
		seen += length
		if !each(Chunk{Stream: Stream(kind), Offset: offset, Data: buf}) {
			return nil
		}
	}
}

func chunkHead(r io.ByteReader) (pause, length uint64, err error) {
	if pause, err = binary.ReadUvarint(r); err != nil {
		return 0, 0, err
	}
	length, err = binary.ReadUvarint(r)
	return pause, length, err
}

// Replay writes a log out again, in the order in which it came and without the
// pauses. Where output was dropped a line on stderr says so. Errors: those of
// the writers, and as for Chunks; what stands before the damage is written.
func Replay(log []byte, stdout, stderr io.Writer) error {
	for c, err := range Chunks(log) {
		if err != nil {
			return err
		}
		w := stdout
		if c.Stream == Stderr {
			w = stderr
		}
		if _, err := w.Write(c.Data); err != nil {
			return err
		}
	}
	dropped, err := Dropped(log)
	if err == nil && dropped > 0 {
		_, err = fmt.Fprintf(stderr, "\n[the log ends here: %d further bytes were not kept]\n", dropped)
	}
	return err
}
