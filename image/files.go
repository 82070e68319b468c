package image

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// files is a set of named files: a directory, or a tar that can be sought in.
type files interface {
	// open opens a regular file. A name that there is not is fs.ErrNotExist.
	open(name string) (file, error)
	close() error
}

// file is one that can be read at any place.
type file interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// dirFiles are the files below a directory, and never others.
type dirFiles struct{ root *os.Root }

func openDir(name string) (*dirFiles, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &dirFiles{root}, nil
}

func (d *dirFiles) open(name string) (file, error) {
	st, err := d.root.Stat(name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is no regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	f, err := d.root.Open(name)
	if err != nil {
		return nil, err
	}
	return osFile{f, st.Size()}, nil
}

func (d *dirFiles) close() error { return d.root.Close() }

type osFile struct {
	*os.File
	size int64
}

func (f osFile) Size() int64 { return f.size }

// What makes a tar the archive of an image.
const (
	ociLayout   = "oci-layout"
	ociIndex    = "index.json"
	dockerIndex = "manifest.json"
)

// maxEntries bounds the table of contents of an image's archive, which has some
// hundred files.
const maxEntries = 1 << 18

// tarFiles are the files in a tar.
type tarFiles struct {
	f       *os.File
	entries map[string]tarEntry
	// many says that there were more entries than an image has.
	many bool
}

// whole fails if not all entries were kept.
func (t *tarFiles) whole() error {
	if t.many {
		return fmt.Errorf("an image with more than %d files: %w", maxEntries, errdefs.ErrResourceExhausted)
	}
	return nil
}

type tarEntry struct {
	at, size int64
	// link is the name that a link leads to.
	link string
}

// scanTar reads the table of contents of a tar. It owns f from then on, unless
// it fails. Of more files than an image has it keeps only those that say that it
// is one.
func scanTar(ctx context.Context, f *os.File, s Select) (*tarFiles, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	t := &tarFiles{f: f, entries: map[string]tarEntry{}}
	r := tar.NewReader(f) // seeks over contents, and reads no further
	for n := int64(1); ; n++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil && n == 1 {
			return nil, fmt.Errorf("neither the archive of an image nor a layer: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, fmt.Errorf("read the archive: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := s.Limits.CheckEntries(n); err != nil {
			return nil, fmt.Errorf("read the archive: %w", err)
		}
		name := clean(h.Name)
		if t.many = n > cmp.Or(s.maxEntries, maxEntries); t.many && name != ociLayout && name != ociIndex && name != dockerIndex {
			continue
		}
		switch h.Typeflag {
		case tar.TypeReg:
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			t.entries[name] = tarEntry{at: at, size: h.Size}
		case tar.TypeSymlink:
			t.entries[name] = tarEntry{link: clean(path.Join(path.Dir(name), h.Linkname))}
		case tar.TypeLink:
			t.entries[name] = tarEntry{link: clean(h.Linkname)}
		}
	}
}

// clean makes names comparable.
func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (t *tarFiles) has(name string) bool {
	_, ok := t.entries[name]
	return ok
}

func (t *tarFiles) open(name string) (file, error) {
	name = clean(name)
	for range 8 { // docker once stored equal layers as links
		e, ok := t.entries[name]
		if !ok {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		if e.link == "" {
			return section{io.NewSectionReader(t.f, e.at, e.size)}, nil
		}
		name = e.link
	}
	return nil, fmt.Errorf("%q is a link to a link: %w", name, errdefs.ErrInvalidArgument)
}

func (t *tarFiles) close() error { return t.f.Close() }

type section struct{ *io.SectionReader }

func (section) Close() error { return nil }

// readAll reads a document, which is never long.
func readAll(from files, name string) ([]byte, error) {
	const most = 16 << 20
	f, err := from.open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, err
	}
	defer f.Close()
	if f.Size() > most {
		return nil, fmt.Errorf("%q has %d bytes: %w", name, f.Size(), errdefs.ErrResourceExhausted)
	}
	data := make([]byte, f.Size())
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, f.Size()), data); err != nil {
		return nil, fmt.Errorf("read %q: %w", name, err)
	}
	return data, nil
}
