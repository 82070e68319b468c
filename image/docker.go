package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerImage is an entry of manifest.json in a docker archive.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func dockerImages(from files) (list []dockerImage, err error) {
	data, err := readAll(from, dockerIndex)
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(data, &list)
	return list, err
}

// isDocker says whether manifest.json is one of a docker archive, and not a
// file of a layer.
func isDocker(from files) bool {
	list, err := dockerImages(from)
	return err == nil && len(list) > 0 && list[0].Config != ""
}

// docker opens an image that docker save wrote.
func docker(ctx context.Context, from files, s Select) (*Image, error) {
	list, err := dockerImages(from)
	if err != nil {
		return nil, fmt.Errorf("manifest.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var names []string
	var found []dockerImage
	for _, d := range list {
		// One without a tag is called as its config.
		called := d.RepoTags
		if len(called) == 0 {
			called = []string{d.Config}
		}
		names = append(names, called...)
		if s.Ref == "" || slices.Contains(called, s.Ref) {
			found = append(found, d)
		}
	}
	if len(found) != 1 {
		return nil, notOne(s.Ref, names)
	}
	one := found[0]
	data, err := readAll(from, one.Config)
	if err != nil {
		return nil, err
	}
	var config ocispec.Image
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", one.Config, err, errdefs.ErrInvalidArgument)
	}
	if err := s.requirePlatform(config.Platform); err != nil {
		return nil, err
	}
	if len(config.RootFS.DiffIDs) != len(one.Layers) {
		return nil, fmt.Errorf("the config has %d DiffIDs for %d layers: %w", len(config.RootFS.DiffIDs), len(one.Layers), errdefs.ErrInvalidArgument)
	}
	img := &Image{from: from, names: map[digest.Digest]string{}}
	if len(one.RepoTags) > 0 {
		img.Name = one.RepoTags[0]
	}
	for i, name := range one.Layers {
		desc, err := dockerLayer(ctx, from, name, config.RootFS.DiffIDs[i])
		if err != nil {
			return nil, fmt.Errorf("layer %q: %w", name, err)
		}
		img.Layers = append(img.Layers, desc)
		img.names[desc.Digest] = name
	}
	return img, nil
}

// dockerLayer describes a layer of a docker archive. One that is not compressed
// has its DiffID as its digest.
func dockerLayer(ctx context.Context, from files, name string, diffID digest.Digest) (desc ocispec.Descriptor, err error) {
	f, err := from.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return desc, err
	}
	defer f.Close()
	kind, err := mediaType(f)
	if err != nil {
		return desc, err
	}
	desc = ocispec.Descriptor{
		MediaType: kind, Digest: diffID, Size: f.Size(),
		Annotations: map[string]string{annotationDiffID: string(diffID)},
	}
	if kind != ocispec.MediaTypeImageLayer {
		desc.Digest, _, err = digestOf(ctx, io.NewSectionReader(f, 0, f.Size()))
	}
	return desc, err
}
