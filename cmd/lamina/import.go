package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/image"
)

func newImport(a *app) *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import FILE|DIR|- [--parent ID] [--ref NAME] [--platform P]",
		Short: "Take the layers of an image in as records",
		Example: `  lamina import image.tar
  docker save alpine | lamina import -
  lamina import layer.tar.gz --parent "$base" --json`,
		Long: `Take the layers of an image in: from an OCI image layout, as a directory or as a
tar, from an archive that docker save wrote, or from a plain layer tar; archives
may be compressed with gzip or zstd. Each layer becomes a lazy record over the one
below it, whose snapshot is made when it is needed (lamina extract); its blob is
verified and kept. Layers that are there are found again. The id of the top is
printed.

--ref names the image where the archive has several, by a tag or by the digest of
its manifest; --platform chooses among those of one name. --parent puts the layers
over a record. The store is not open while the archive is read; one that cannot be
sought in, as from a pipe, is copied to a temporary file first, in TMPDIR. An
archive may unpack to 1 TiB and have 16 million files.`,
		Args:        cobra.ExactArgs(1),
		Annotations: map[string]string{annotateProbes: ""},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault // archives are files
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range []string{"parent", "ref", "platform"} {
				if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() == "" {
					return usagef(cmd, "--%s is empty", name)
				}
			}
			if args[0] == "" {
				return usagef(cmd, "the name of the file is empty")
			}
			if args[0] == "-" && isTerminal(os.Stdin) {
				return usagef(cmd, "standard input is a terminal: name a file, or use a pipe")
			}
			return selected(cmd, a.importImage(cmd.Context(), args[0], o))
		},
	}
	cmd.Flags().StringVar(&o.parent, "parent", "", "the record `ID` below the layers")
	cmd.Flags().StringVar(&o.ref, "ref", "", "the image of that `NAME` or tag")
	cmd.Flags().StringVar(&o.platform, "platform", "", "the image for platform `P`, as linux/arm64")
	_ = cmd.RegisterFlagCompletionFunc("parent", a.completeIDs(1))
	return cmd
}

// selected says how to choose an image where the choice was none.
func selected(cmd *cobra.Command, err error) error {
	var s *image.SelectError
	if !errors.As(err, &s) {
		return err
	}
	if len(s.Choices) > 0 {
		err = hintf(err, "choose one with --%s", s.By)
	}
	return usage(cmd, err)
}

type importOptions struct{ parent, ref, platform string }

// importView is what import prints in JSON.
type importView struct {
	ID     cache.ID    `json:"id"`
	Layers []layerView `json:"layers"`
}

type layerView struct {
	ID     cache.ID      `json:"id"`
	Digest digest.Digest `json:"digest"`
	DiffID digest.Digest `json:"diff_id"`
	State  string        `json:"state"`
}

func (a *app) importImage(ctx context.Context, name string, o importOptions) (err error) {
	img, err := image.Open(ctx, name, image.Select{Ref: o.ref, Platform: o.platform})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	if len(img.Layers) == 0 {
		return fmt.Errorf("the image has no layers: %w", errdefs.ErrInvalidArgument)
	}
	w, err := a.blobWriter(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Release()) }()
	if err := a.putBlobs(ctx, w, img); err != nil {
		return err
	}
	v, err := a.makeLayers(ctx, w, img, o)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(a.out, v)
	}
	return printLine(a.out, string(v.ID))
}

// blobWriter opens the store, makes it if need be, and closes it again.
func (a *app) blobWriter(ctx context.Context) (w *cache.BlobWriter, err error) {
	m, err := a.open(ctx, making)
	if err != nil {
		return nil, err
	}
	defer shut(m, &err)
	return m.BlobWriter(ctx)
}

// putBlobs copies the blobs of the layers into the content store.
func (a *app) putBlobs(ctx context.Context, w *cache.BlobWriter, img *image.Image) error {
	var done atomic.Int64
	defer a.progress("importing", func() string { return size(done.Load()) })()
	for _, l := range img.Layers {
		if err := putBlob(ctx, w, img, l); err != nil {
			return fmt.Errorf("import layer %s: %w", l.Digest, err)
		}
		done.Add(l.Size)
	}
	return nil
}

func putBlob(ctx context.Context, w *cache.BlobWriter, img *image.Image, l ocispec.Descriptor) (err error) {
	ra, err := img.ReaderAt(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	return w.Put(ctx, l, content.NewReader(ra))
}

// makeLayers makes the records. With the store open it ends the writing of
// blobs, so that nothing is left to settle.
func (a *app) makeLayers(ctx context.Context, w *cache.BlobWriter, img *image.Image, o importOptions) (v importView, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return v, err
	}
	defer shut(m, &err)
	defer func() { err = errors.Join(err, w.Release()) }()
	var top *cache.ImmutableRef
	defer func() {
		if top != nil {
			err = errors.Join(err, top.Release(ctx))
		}
	}()
	if o.parent != "" {
		id, err := resolve(ctx, m, o.parent)
		if err != nil {
			return v, fmt.Errorf("--parent: %w", err)
		}
		if top, err = m.Get(ctx, id, cache.GetOptions{}); err != nil {
			return v, about(id, fmt.Errorf("--parent: %w", err))
		}
	}
	for _, l := range img.Layers {
		b := cache.BlobOptions{}
		if img.Name != "" {
			b.Description, b.ImageRefs = "layer of "+img.Name, []string{img.Name}
		}
		ref, err := m.GetByBlob(ctx, l, top, b)
		if err != nil {
			return v, err
		}
		if top != nil {
			err = top.Release(ctx)
		}
		if top = ref; err != nil {
			return v, err
		}
		rec := ref.Record()
		v.ID = rec.ID
		v.Layers = append(v.Layers, layerView{rec.ID, l.Digest, rec.DiffID, rec.State.String()})
	}
	return v, nil
}
