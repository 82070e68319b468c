package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	// annotationName is where containerd and docker write the whole name.
	annotationName = "io.containerd.image.name"
)

// layout opens an image of an OCI image layout.
func layout(from files, s Select) (*Image, error) {
	data, err := readAll(from, "index.json")
	if err != nil {
		return nil, fmt.Errorf("no OCI image layout: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	top, name, err := byRef(index.Manifests, s.Ref)
	if err != nil {
		return nil, err
	}
	desc, err := byPlatform(from, top, s.Platform)
	if err != nil {
		return nil, err
	}
	var manifest ocispec.Manifest
	if err := document(from, desc, &manifest); err != nil {
		return nil, err
	}
	var config ocispec.Image
	if err := document(from, manifest.Config, &config); err != nil {
		return nil, err
	}
	if len(config.RootFS.DiffIDs) != len(manifest.Layers) {
		return nil, fmt.Errorf("the config has %d DiffIDs for %d layers: %w", len(config.RootFS.DiffIDs), len(manifest.Layers), errdefs.ErrInvalidArgument)
	}
	img := &Image{Name: name, from: from, names: map[digest.Digest]string{}}
	for i, l := range manifest.Layers {
		if err := l.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("layer %d: %w: %w", i, err, errdefs.ErrInvalidArgument)
		}
		l.Annotations = maps.Clone(l.Annotations)
		if l.Annotations == nil {
			l.Annotations = map[string]string{}
		}
		l.Annotations[annotationDiffID] = string(config.RootFS.DiffIDs[i])
		img.Layers = append(img.Layers, l)
		img.names[l.Digest] = blobName(l.Digest)
	}
	return img, nil
}

func blobName(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// byRef picks the manifests of one name.
func byRef(all []ocispec.Descriptor, ref string) (list []ocispec.Descriptor, name string, err error) {
	named := map[string][]ocispec.Descriptor{}
	for _, d := range all {
		name := d.Annotations[ocispec.AnnotationRefName]
		full := d.Annotations[annotationName]
		switch {
		case ref != "" && (ref == name || ref == full):
			named[ref] = append(named[ref], d)
		case ref == "" && full != "":
			named[full] = append(named[full], d)
		case ref == "":
			named[name] = append(named[name], d)
		}
	}
	if len(named) == 1 {
		for name, list := range named {
			return list, name, nil
		}
	}
	return nil, "", notOne(ref, refsOf(all))
}

func refsOf(all []ocispec.Descriptor) (refs []string) {
	for _, d := range all {
		for _, name := range []string{d.Annotations[annotationName], d.Annotations[ocispec.AnnotationRefName]} {
			if name != "" {
				refs = append(refs, name)
				break
			}
		}
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}

// notOne says that a name means no image, or that one is needed.
func notOne(ref string, refs []string) error {
	there := "none has a name"
	if len(refs) > 0 {
		there = "there are " + strings.Join(refs[:min(len(refs), 10)], ", ")
	}
	if ref == "" {
		return fmt.Errorf("there is not exactly one image, so its name is needed; %s: %w", there, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("no image is called %q; %s: %w", ref, there, errdefs.ErrInvalidArgument)
}

// byPlatform picks the manifest of a platform among manifests and what indexes
// list. One that says nothing of a platform is taken if it is the only one.
func byPlatform(from files, list []ocispec.Descriptor, platform string) (none ocispec.Descriptor, err error) {
	all, err := manifests(from, list, 0, new(int))
	if err != nil {
		return none, err
	}
	if platform == "" && len(all) == 1 {
		return all[0], nil
	}
	match := platforms.Default()
	if platform != "" {
		p, err := platforms.Parse(platform)
		if err != nil {
			return none, fmt.Errorf("platform %q: %w: %w", platform, err, errdefs.ErrInvalidArgument)
		}
		match = platforms.Only(p)
	}
	var fits []ocispec.Descriptor
	var there []string
	for _, d := range all {
		p, err := platformOf(from, d)
		if err != nil {
			return none, err
		}
		there = append(there, platforms.Format(p))
		if match.Match(p) {
			fits = append(fits, d)
			d.Platform = &p
			fits[len(fits)-1] = d
		}
	}
	if len(fits) == 0 {
		return none, fmt.Errorf("no image is for this platform; there are %s: %w", strings.Join(there, ", "), errdefs.ErrInvalidArgument)
	}
	slices.SortStableFunc(fits, func(a, b ocispec.Descriptor) int {
		switch {
		case match.Less(*a.Platform, *b.Platform):
			return -1
		case match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return fits[0], nil
}

// maxDescriptors bounds what indexes list, with all that they name in turn: an
// index can name another one any number of times.
const maxDescriptors = 10_000

// manifests lists the manifests in list and in the indexes that it names, but
// not those that BuildKit attaches to say how an image was made. seen counts
// what it has looked at.
func manifests(from files, list []ocispec.Descriptor, depth int, seen *int) (out []ocispec.Descriptor, err error) {
	if *seen += len(list); *seen > maxDescriptors {
		return nil, fmt.Errorf("the indexes list more than %d manifests: %w", maxDescriptors, errdefs.ErrResourceExhausted)
	}
	for _, d := range list {
		switch d.MediaType {
		case ocispec.MediaTypeImageManifest, dockerManifest:
			if d.Annotations["vnd.docker.reference.type"] == "" {
				out = append(out, d)
			}
		case ocispec.MediaTypeImageIndex, dockerManifestList:
			if depth > 3 {
				return nil, fmt.Errorf("indexes in indexes in indexes: %w", errdefs.ErrInvalidArgument)
			}
			var index ocispec.Index
			if err := document(from, d, &index); err != nil {
				return nil, err
			}
			inner, err := manifests(from, index.Manifests, depth+1, seen)
			if err != nil {
				return nil, err
			}
			out = append(out, inner...)
		}
	}
	if depth == 0 && len(out) == 0 {
		return nil, fmt.Errorf("there is no image: %w", errdefs.ErrInvalidArgument)
	}
	return out, nil
}

// platformOf is what a descriptor says, or else the image's config.
func platformOf(from files, d ocispec.Descriptor) (ocispec.Platform, error) {
	if d.Platform != nil {
		return platforms.Normalize(*d.Platform), nil
	}
	var manifest ocispec.Manifest
	if err := document(from, d, &manifest); err != nil {
		return ocispec.Platform{}, err
	}
	var config ocispec.Image
	if err := document(from, manifest.Config, &config); err != nil {
		return ocispec.Platform{}, err
	}
	return platforms.Normalize(config.Platform), nil
}

// document reads the JSON that a descriptor names, and verifies it.
func document(from files, d ocispec.Descriptor, into any) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	data, err := readAll(from, blobName(d.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the layout lacks %s: %w", d.Digest, err)
	}
	if err != nil {
		return err
	}
	if d.Digest.Algorithm().FromBytes(data) != d.Digest {
		return fmt.Errorf("%s has other bytes: %w", d.Digest, errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%s: %w: %w", d.Digest, err, errdefs.ErrInvalidArgument)
	}
	return nil
}
