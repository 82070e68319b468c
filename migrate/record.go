package migrate

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate/buildkit"
)

// writable is what the driver's key of a writable snapshot ends in, behind the
// id that it was made for.
const writable = "-w"

// verifiedName says whether a snapshot's name is one that only a verified
// layer gets: v0.34 began with it because older daemons could commit what they
// had not verified under the chain id.
func verifiedName(name string) bool {
	return strings.HasPrefix(name, "buildkit-layer-snapshot-v1-")
}

// newRecord is what a row says by itself.
func newRecord(r *buildkit.Row) *metadata.Record {
	rec := &metadata.Record{
		ID: metadata.ID(r.ID), Op: metadata.Base,
		Retain: r.Retain, Type: r.RecordType, Description: r.Description,
		Created: r.Created, LastUsed: r.LastUsed, UsageCount: r.UsageCount, Size: r.Size,
		ChainID: r.ChainID, DiffID: r.DiffID, ImageRefs: slices.Clone(r.ImageRefs),
		Values: valuesOf(r),
	}
	add := func(op metadata.Op, ids ...string) {
		rec.Op = op
		for _, id := range ids {
			if id != "" {
				rec.Parents = append(rec.Parents, metadata.ID(id))
			}
		}
	}
	switch {
	case r.IsMerge():
		add(metadata.Merge, r.MergeParents...)
	case r.IsDiff():
		add(metadata.Diff, r.DiffLower, r.DiffUpper)
	case r.Parent != "":
		add(metadata.Layer, r.Parent)
	}
	if r.Blob != "" {
		rec.Blobs = []metadata.Blob{{
			Digest: r.Blob, MediaType: r.MediaType, Size: max(r.BlobSize, 0), DiffID: r.DiffID, URLs: slices.Clone(r.URLs),
		}}
	}
	return rec
}

func valuesOf(r *buildkit.Row) []metadata.Value {
	var values []metadata.Value
	for _, v := range r.Values {
		values = append(values, metadata.Value{Name: v.Name, Data: v.JSON, Index: v.Index})
	}
	return values
}

// pairRecord folds the two rows of a pair.
func pairRecord(r, m *buildkit.Row) *metadata.Record {
	rec, mut := newRecord(r), newRecord(m)
	rec.State = metadata.Committed
	rec.Durable = true
	rec.Retain = rec.Retain || mut.Retain
	mergeUsage(rec, mut)
	if len(rec.Parents) == 0 {
		rec.Parents, rec.Op = mut.Parents, mut.Op
	}
	if rec.Created.IsZero() {
		rec.Created = mut.Created
	}
	if rec.Description == "" {
		rec.Description = mut.Description
	}
	if rec.Type == "" {
		rec.Type = mut.Type
	}
	if len(rec.ImageRefs) == 0 {
		rec.ImageRefs = mut.ImageRefs
	}
	if rec.Size == metadata.SizeUnknown {
		rec.Size = mut.Size
	}
	rec.Values = unionValues(rec.Values, mut.Values)
	return rec
}

// mergeUsage takes the larger of each, as both rows of a pair are counted at
// each release.
func mergeUsage(into, from *metadata.Record) {
	into.UsageCount = max(into.UsageCount, from.UsageCount)
	into.LastUsed = later(into.LastUsed, from.LastUsed)
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// unionValues adds those of more whose name is not taken.
func unionValues(values, more []metadata.Value) []metadata.Value {
	have := map[string]bool{}
	for _, v := range values {
		have[v.Name] = true
	}
	for _, v := range more {
		if !have[v.Name] {
			values = append(values, v)
		}
	}
	return values
}

// joinValues adds the values of a twin, all of them, as its index keys must go
// on to find the record: those whose name is taken get the twin's id behind it.
func joinValues(values, more []metadata.Value, id string) []metadata.Value {
	taken := map[string]metadata.Value{}
	for _, v := range values {
		taken[v.Name] = v
	}
	for _, v := range more {
		if have, ok := taken[v.Name]; ok {
			if have.Index == v.Index {
				continue
			}
			v.Name += "/" + id
		}
		values = append(values, v)
	}
	return values
}

// addVariants completes the blobs of a record from the content store: whether
// they are there, sizes, and the forms in other compressions that were made of them.
func addVariants(rec *metadata.Record, blobs map[digest.Digest]*buildkit.Blob) {
	for i := range rec.Blobs {
		b := blobs[rec.Blobs[i].Digest]
		if b == nil {
			continue
		}
		rec.Blobs[i].Stored = b.Present
		if rec.Blobs[i].Size == 0 {
			rec.Blobs[i].Size = b.Size
		}
	}
	have := map[digest.Digest]bool{}
	for _, b := range rec.Blobs {
		have[b.Digest] = true
	}
	// Variants point to each other, so one step from each finds all; those
	// that are found are looked at, too.
	for i := 0; i < len(rec.Blobs); i++ {
		from := blobs[rec.Blobs[i].Digest]
		if from == nil {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(from.Labels)) {
			d := digest.Digest(from.Labels[name])
			to := blobs[d]
			if !strings.HasPrefix(name, "containerd.io/gc.ref.content.blob-") || have[d] || to == nil || !to.Present {
				continue
			}
			have[d] = true
			if v, ok := variant(to, rec.DiffID); ok {
				rec.Blobs = append(rec.Blobs, v)
			}
		}
	}
}

// variant reads the descriptor that BuildKit leaves in the labels of a blob.
func variant(b *buildkit.Blob, diffID digest.Digest) (metadata.Blob, bool) {
	const annotation = "buildkit.io/blob/annotation."
	v := metadata.Blob{
		Digest: b.Digest, Size: b.Size, Stored: b.Present, DiffID: diffID, MediaType: b.Labels["buildkit.io/blob/mediatype"],
	}
	for name, value := range b.Labels {
		if key, ok := strings.CutPrefix(name, annotation); ok {
			if v.Annotations == nil {
				v.Annotations = map[string]string{}
			}
			v.Annotations[key] = value
		}
	}
	said := b.Labels["containerd.io/uncompressed"]
	if said == "" {
		said = v.Annotations["containerd.io/uncompressed"]
	}
	// A blob of another layer is no form of this one.
	return v, v.MediaType != "" && (said == "" || diffID == "" || said == string(diffID))
}
