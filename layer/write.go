package layer

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Source is what a layer is written from: Upper or Trees.
type Source interface {
	write(e *emitter) error
}

// Upper is the upper directory of an overlay. Only what is in it is read.
type Upper struct {
	Dir string
	// Form is OverlayTrusted or OverlayUser.
	Form Form
	// Parents are the directories of the layers below, topmost first, in the
	// same form. They are looked at where the upper directory does not tell a
	// change from none: an opaque mark where nothing is below, a directory
	// or a copied file that is as it was. With none it is not known what lies below,
	// and every mark and directory has its entry.
	Parents []string
}

// Trees are two whole trees, as mounts or plain directories show them: the
// layer is what makes Upper of Lower. Both are walked. Files are compared by
// their attributes, times to the nanosecond, and where these are equal by
// their content.
type Trees struct {
	// Lower may be empty: the layer is then all of Upper.
	Lower, Upper string
}

// WriteOptions are the options of Write.
type WriteOptions struct {
	// SourceDateEpoch, if not nil, is the latest time that a file may have:
	// later ones become this one.
	SourceDateEpoch *time.Time
	// Nanoseconds keeps times as they are. Without it they are cut to whole
	// seconds, as other engines do; a header is then half as long.
	Nanoseconds bool
}

// Written says what was written.
type Written struct {
	// DiffID is the SHA-256 of the tar.
	DiffID digest.Digest
	// Size is the length of the tar, in bytes.
	Size int64
	// Entries counts files, directories and whiteouts.
	Entries int64
	// Bytes is the content of all files.
	Bytes int64
	// Sockets is how many were left out: a tar cannot hold them.
	Sockets int64
}

// Write writes the layer tar of src to w. The same content gives the same
// bytes, whenever and by whomever it is written; see the package's doc.
//
// w is written to by another goroutine; Write returns when that has ended. The
// directories must not change meanwhile: a file that does is Aborted.
//
// Errors: *EntryError for what an entry meets; FailedPrecondition for a tree
// that no layer can hold, as with names that begin with ".wh.", and for a layer
// with redirect or metacopy attributes; errors of w and of ctx as they are.
func Write(ctx context.Context, w io.Writer, src Source, o WriteOptions) (_ Written, err error) {
	s := startSink(w)
	defer func() {
		if cerr := s.close(); cerr != nil {
			err = cerr
		}
	}()
	e := newEmitter(ctx, s, o)
	if err := src.write(e); err != nil {
		return Written{}, err
	}
	if err := e.tar.Close(); err != nil {
		return Written{}, err
	}
	if err := s.close(); err != nil {
		return Written{}, err
	}
	e.out.DiffID, e.out.Size = s.digest(), s.size
	return e.out, nil
}

func (f Form) checkUpper() error {
	if f != OverlayTrusted && f != OverlayUser {
		return fmt.Errorf("form %d of an upper directory: %w", int(f), errdefs.ErrInvalidArgument)
	}
	return nil
}
