package metadata

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/lamina-build/lamina/metadata/internal/recordpb"
)

// encodeRecord returns the framed value of a record.
func encodeRecord(r *Record) ([]byte, error) {
	m := recordToPB(r)
	b, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(make([]byte, frameHeader, frameHeader+proto.Size(m)), m)
	if err != nil {
		return nil, fmt.Errorf("encode record %q: %w", r.ID, err)
	}
	fillFrame([]byte(r.row), b)
	return b, nil
}

func recordToPB(r *Record) *recordpb.Record {
	m := &recordpb.Record{
		State: uint32(r.State), Op: uint32(r.Op), Revision: r.Revision,
		Key: []byte(r.Key), Was: []byte(r.Was),
		Parents: toBytes(r.Parents), Aliases: toBytes(r.Aliases),
		Retain: r.Retain, Interrupted: r.Interrupted, RetainAfter: r.RetainAfter,
		OnPowerCut: uint32(r.OnPowerCut), Durable: r.Durable, Raw: r.Raw,
		Type: []byte(r.Type), Description: []byte(r.Description), Labels: pairs(r.Labels),
		Created: toInstant(r.Created), LastUsed: toInstant(r.LastUsed),
		UsageCount: r.UsageCount, Cost: int64(r.Cost), Size: r.Size,
		ChainId: []byte(r.ChainID), DiffId: []byte(r.DiffID), Verified: r.Verified,
		ImageRefs: toBytes(r.ImageRefs),
	}
	if r.ID != r.row {
		m.Id = []byte(r.ID)
	}
	for _, b := range r.Blobs {
		m.Blobs = append(m.Blobs, blobToPB(b))
	}
	for _, v := range r.Values {
		pv := &recordpb.Value{Name: []byte(v.Name), Data: v.Data, Index: []byte(v.Index)}
		pv.ProtoReflect().SetUnknown(v.unknown)
		m.Values = append(m.Values, pv)
	}
	m.ProtoReflect().SetUnknown(r.unknown)
	return m
}

func blobToPB(b Blob) *recordpb.Blob {
	m := &recordpb.Blob{
		Digest: []byte(b.Digest), MediaType: []byte(b.MediaType), Size: b.Size,
		DiffId: []byte(b.DiffID), Annotations: pairs(b.Annotations), Urls: toBytes(b.URLs), Stored: b.Stored, Claimed: b.Claimed,
	}
	m.ProtoReflect().SetUnknown(b.unknown)
	return m
}

func toBytes[S ~string](list []S) [][]byte {
	var out [][]byte
	for _, s := range list {
		out = append(out, []byte(s))
	}
	return out
}

func pairs(m map[string]string) []*recordpb.Pair {
	var out []*recordpb.Pair
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, &recordpb.Pair{Key: []byte(k), Value: []byte(m[k])})
	}
	return out
}

func toInstant(t time.Time) *recordpb.Instant {
	if t.IsZero() {
		return nil
	}
	return &recordpb.Instant{Seconds: t.Unix(), Nanos: int32(t.Nanosecond())}
}

func fromInstant(i *recordpb.Instant) time.Time {
	if i == nil {
		return time.Time{}
	}
	return time.Unix(i.Seconds, int64(i.Nanos)).UTC()
}

func encodeMeta(m Meta) ([]byte, error) {
	pm := &recordpb.Meta{
		Created: toInstant(m.Created), MigratedFrom: []byte(m.MigratedFrom),
		Driver: []byte(m.Driver), Attributes: []byte(m.Attributes), BootId: []byte(m.BootID),
	}
	pm.ProtoReflect().SetUnknown(m.unknown)
	b, err := proto.Marshal(pm)
	if err != nil {
		return nil, fmt.Errorf("encode meta: %w", err)
	}
	return b, nil
}

func decodeMeta(payload []byte) (Meta, error) {
	var m recordpb.Meta
	if err := proto.Unmarshal(payload, &m); err != nil {
		return Meta{}, err
	}
	return Meta{
		Created: fromInstant(m.Created), MigratedFrom: string(m.MigratedFrom),
		Driver: string(m.Driver), Attributes: string(m.Attributes), BootID: string(m.BootId),
		unknown: m.ProtoReflect().GetUnknown(),
	}, nil
}

func encodeTotal(count, size int64) ([]byte, error) {
	b, err := proto.Marshal(&recordpb.Total{Count: count, Bytes: size})
	if err != nil {
		return nil, fmt.Errorf("encode total: %w", err)
	}
	return b, nil
}

func decodeTotal(payload []byte) (count, size int64, err error) {
	var m recordpb.Total
	if err := proto.Unmarshal(payload, &m); err != nil {
		return 0, 0, err
	}
	return m.Count, m.Bytes, nil
}
