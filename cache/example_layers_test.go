package cache_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	digest "github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// exampleRegistry has an image of one layer.
func exampleRegistry() (*registry, blob) {
	b := pack(nil, layer.Gzip, layerTar(nil, file{name: "etc-os", text: "debian"}))
	return newRegistry(b), b
}

func ExampleManager_GetByBlob() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	registry, b := exampleRegistry()
	desc := b.desc

	ref, err := m.GetByBlob(ctx, desc, nil, cache.BlobOptions{Provider: registry})
	if err != nil {
		log.Fatal(err)
	}
	defer ref.Release(ctx)
	fmt.Println(ref.Record().State, "after", registry.reads.Load(), "downloads")

	if err := ref.Extract(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(ref.Record().State, "after", registry.reads.Load(), "download")
	// Output:
	// lazy after 0 downloads
	// finalized after 1 download
}

func ExampleMissingBlobsError() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	registry, b := exampleRegistry()
	desc := b.desc
	ref, err := m.GetByBlob(ctx, desc, nil, cache.BlobOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer ref.Release(ctx)

	err = ref.Extract(ctx)
	var missing *cache.MissingBlobsError
	if errors.As(err, &missing) {
		fmt.Println(len(missing.Digests), "layer to be provided")
		again, err := m.GetByBlob(ctx, desc, nil, cache.BlobOptions{Provider: registry})
		if err != nil {
			log.Fatal(err)
		}
		defer again.Release(ctx)
	}
	fmt.Println(ref.Extract(ctx))
	// Output:
	// 1 layer to be provided
	// <nil>
}

func ExampleManager_Merge() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	tools, app := exampleLayer(m, nil, "cc", "1"), exampleLayer(m, nil, "app", "2")
	defer tools.Release(ctx)
	defer app.Release(ctx)

	both, err := m.Merge(ctx, []*cache.ImmutableRef{tools, app}, cache.MergeOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer both.Release(ctx)
	mnt, err := both.Mount(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer mnt.Unmount()
	names, err := filepath.Glob(filepath.Join(mnt.Path(), "*"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(names), "files")
	// Output: 2 files
}

func ExampleManager_Diff() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	base := exampleLayer(m, nil, "base", "1")
	defer base.Release(ctx)
	result := exampleLayer(m, base, "result", "2")
	defer result.Release(ctx)
	other := exampleLayer(m, nil, "newer-base", "3")
	defer other.Release(ctx)

	made, err := m.Diff(ctx, base, result, cache.MergeOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer made.Release(ctx)
	rebased, err := m.Merge(ctx, []*cache.ImmutableRef{other, made}, cache.MergeOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer rebased.Release(ctx)
	mnt, err := rebased.Mount(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer mnt.Unmount()
	names, err := os.ReadDir(mnt.Path())
	if err != nil {
		log.Fatal(err)
	}
	for _, n := range names {
		fmt.Println(n.Name())
	}
	// Output:
	// newer-base
	// result
}

func ExampleImmutableRef_GetRemotes() {
	ctx := context.Background()
	m, done := exampleCache()
	defer done()
	ref := exampleLayer(m, nil, "app", "1")
	defer ref.Release(ctx)

	remote, err := ref.GetRemotes(ctx, cache.RemotesOptions{
		Create:      true,
		Compression: cache.Compression{Algorithm: layer.Zstd},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer remote.Release(ctx)
	for _, desc := range remote.Descriptors {
		blob, err := remote.Provider.ReaderAt(ctx, desc)
		if err != nil {
			log.Fatal(err)
		}
		data := make([]byte, blob.Size())
		if _, err := blob.ReadAt(data, 0); err != nil {
			log.Fatal(err)
		}
		fmt.Println(desc.MediaType, digest.FromBytes(data) == desc.Digest)
		blob.Close()
	}
	// Output: application/vnd.oci.image.layer.v1.tar+zstd true
}
