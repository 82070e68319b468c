// Package image reads and writes images as files: OCI image layouts, as a
// directory or as a tar of one, the archives that docker save writes, and plain
// layer tars. It knows nothing of caches and snapshots: what it gives and takes
// are descriptors of layers and readers of their blobs.
//
// Archives come from strangers. Names in them lead nowhere outside, documents
// that are too long are refused, and what a layer's descriptor says is for the
// reader of the blob to verify.
package image
