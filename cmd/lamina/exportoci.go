package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/image"
)

// ociView is what export --format oci prints in JSON.
type ociView struct {
	stateView
	Layers []exportedLayer `json:"layers"`
	Bytes  int64           `json:"bytes"`
}

type exportedLayer struct {
	Digest    string `json:"digest"`
	DiffID    string `json:"diff_id"`
	MediaType string `json:"media_type"`
	Size      int64  `json:"size"`
}

// exportOCI writes a record as an image. The store is open while blobs are
// made, not while they are copied.
func (a *app) exportOCI(ctx context.Context, arg string, o exportOptions, form cache.RemotesOptions) error {
	v, remote, hold, err := a.remoteOf(ctx, arg, form)
	if err != nil {
		return err
	}
	out := image.Output{Layers: remote.Descriptors, Provider: remote.Provider}
	stop := a.progress("exporting", nil)
	if isDirectory(o.file) {
		err = writeLayout(ctx, o.file, out)
	} else {
		err = a.writeTo(o.file, func(w io.Writer) error { return image.WriteTar(ctx, w, out) })
	}
	stop()
	if err = errors.Join(err, hold.Release()); err != nil {
		return about(v.ID, fmt.Errorf("export record %s: %w", v.ID, err))
	}
	if !a.json {
		return nil
	}
	for _, d := range remote.Descriptors {
		v.Layers = append(v.Layers, exportedLayer{string(d.Digest), d.Annotations["containerd.io/uncompressed"], d.MediaType, d.Size})
		v.Bytes += d.Size
	}
	w := a.err
	if o.file != "" && o.file != "-" {
		w = a.out
	}
	return printJSON(w, v)
}

// remoteOf makes the blobs of a record, and holds it against others.
func (a *app) remoteOf(ctx context.Context, arg string, form cache.RemotesOptions) (v ociView, remote *cache.Remote, hold *cache.Hold, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return v, nil, nil, err
	}
	defer shut(m, &err)
	id, err := resolve(ctx, m, arg)
	if err != nil {
		return v, nil, nil, err
	}
	defer func() { err = about(id, err) }()
	ref, err := m.Get(ctx, id, cache.GetOptions{})
	if err != nil {
		return v, nil, nil, err
	}
	stop := a.progress("making layers", nil)
	remote, err = ref.GetRemotes(ctx, form)
	stop()
	if err != nil {
		return v, nil, nil, errors.Join(err, ref.Release(ctx))
	}
	v.stateView, v.Layers = stateOf(ref.Record(), id), []exportedLayer{}
	hold, err = ref.Detach(ctx)
	return v, remote, hold, errors.Join(err, remote.Release(ctx))
}

// isDirectory says whether a layout goes into a directory of that name.
func isDirectory(name string) bool {
	if strings.HasSuffix(name, "/") {
		return true
	}
	st, err := os.Stat(name)
	return err == nil && st.IsDir()
}

// writeLayout writes a layout into a directory that is empty or not there. What
// was written goes again if it fails.
func writeLayout(ctx context.Context, dir string, out image.Output) error {
	err := os.Mkdir(dir, 0o755)
	made := err == nil
	if errors.Is(err, os.ErrExist) {
		names, rerr := os.ReadDir(dir)
		if err = rerr; err == nil && len(names) > 0 {
			err = fmt.Errorf("-o %s is not empty: %w", dir, errdefs.ErrInvalidArgument)
		}
	}
	if err != nil {
		return err
	}
	if err = image.WriteDir(ctx, dir, out); err == nil {
		return nil
	}
	if made {
		return errors.Join(err, os.RemoveAll(dir))
	}
	names, rerr := os.ReadDir(dir)
	err = errors.Join(err, rerr)
	for _, n := range names {
		err = errors.Join(err, os.RemoveAll(dir+"/"+n.Name()))
	}
	return err
}
