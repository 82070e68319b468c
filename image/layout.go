package image

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

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
	data, err := readAll(from, ociIndex)
	if err != nil {
		return nil, fmt.Errorf("no OCI image layout: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("index.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	top, name, err := byRef(from, index.Manifests, s.Ref)
	if err != nil {
		return nil, err
	}
	desc, err := byPlatform(from, top, s)
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

// byRef picks the manifests of one name, or the one with a digest, and gives the
// name that they have.
func byRef(from files, all []ocispec.Descriptor, ref string) (list []ocispec.Descriptor, name string, err error) {
	named := map[string][]ocispec.Descriptor{}
	for _, d := range all {
		switch tag, name := d.Annotations[ocispec.AnnotationRefName], nameOf(d); {
		case ref == "":
			named[name] = append(named[name], d)
		case ref == tag || ref == name:
			named[ref] = append(named[ref], d)
		}
	}
	if len(named) == 1 {
		for name, list := range named {
			return list, name, nil
		}
	}
	if _, err := digest.Parse(ref); err == nil {
		inner, err := manifests(from, all, 0, new(int))
		if err != nil {
			return nil, "", err
		}
		for _, d := range slices.Concat(all, inner) {
			if string(d.Digest) == ref {
				return []ocispec.Descriptor{d}, nameOf(d), nil
			}
		}
	}
	choices := make([]string, len(all))
	for i, d := range all {
		choices[i] = cmp.Or(nameOf(d), string(d.Digest))
	}
	return nil, "", notOne(ref, choices)
}

// nameOf is the name of an image in an index, empty if it has none.
func nameOf(d ocispec.Descriptor) string {
	return cmp.Or(d.Annotations[annotationName], d.Annotations[ocispec.AnnotationRefName])
}

// notOne says that a name means no image, or that one is needed.
func notOne(ref string, choices []string) error {
	e := &SelectError{By: "ref", Choices: slices.Compact(slices.Sorted(slices.Values(choices)))}
	switch {
	case ref != "":
		e.What = fmt.Sprintf("no image is called %q", ref)
	case len(choices) == 0:
		e.What = "there is no image"
	default:
		e.What = "there are several images"
	}
	return e
}

// matcher says which platforms are meant.
func (s Select) matcher() (platforms.MatchComparer, error) {
	if s.Platform == "" {
		return platforms.Default(), nil
	}
	p, err := platforms.Parse(s.Platform)
	if err != nil {
		return nil, &SelectError{What: fmt.Sprintf("%q is no platform, one is for example linux/arm64", s.Platform), By: "platform"}
	}
	return platforms.Only(p), nil
}

// requirePlatform refuses an image that is not for the platform that was asked
// for.
func (s Select) requirePlatform(p ocispec.Platform) error {
	if s.Platform == "" {
		return nil
	}
	match, err := s.matcher()
	if err == nil && !match.Match(p) {
		err = s.noneFits([]string{platforms.Format(p)})
	}
	return err
}

func (s Select) noneFits(there []string) error {
	what := "no image is for this machine's platform"
	if s.Platform != "" {
		what = fmt.Sprintf("no image is for platform %q", s.Platform)
	}
	return &SelectError{What: what, By: "platform", Choices: slices.Compact(slices.Sorted(slices.Values(there)))}
}

// byPlatform picks the manifest of a platform among manifests and what indexes
// list. One that says nothing of a platform is taken if it is the only one. Two
// different ones that fit equally well are none.
func byPlatform(from files, list []ocispec.Descriptor, s Select) (none ocispec.Descriptor, err error) {
	all, err := manifests(from, list, 0, new(int))
	if err != nil {
		return none, err
	}
	match, err := s.matcher()
	if err != nil {
		return none, err
	}
	var fits []ocispec.Descriptor
	var there []string
	for _, d := range all {
		if s.Platform == "" && len(all) == 1 {
			return d, nil
		}
		p, err := platformOf(from, d)
		if err != nil {
			return none, err
		}
		there = append(there, platforms.Format(p))
		if match.Match(p) {
			d.Platform = &p
			fits = append(fits, d)
		}
	}
	if len(fits) == 0 {
		return none, s.noneFits(there)
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
	choices := []string{string(fits[0].Digest)}
	for _, d := range fits[1:] {
		if d.Digest != fits[0].Digest && !match.Less(*fits[0].Platform, *d.Platform) {
			choices = append(choices, string(d.Digest))
		}
	}
	if len(choices) > 1 {
		what := "there are several images for platform " + platforms.Format(*fits[0].Platform)
		return none, &SelectError{What: what, By: "ref", Choices: slices.Compact(slices.Sorted(slices.Values(choices)))}
	}
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
		return nil, notOne("", nil)
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
