package metadata

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
	"unsafe"

	digest "github.com/opencontainers/go-digest"
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

// decodeRecord reads the framed value of a row. The result shares no memory
// with it. An error can name the record by its row only.
func decodeRecord(row ID, value []byte) (*Record, error) {
	return decodeRecordBy(new(recordpb.Record), row, value)
}

// decodeRecordBy is decodeRecord by means of a message that serves again: who
// decodes all records makes half the garbage.
func decodeRecordBy(m *recordpb.Record, row ID, value []byte) (*Record, error) {
	damaged := func(reason error) error {
		return &DamagedError{Bucket: bucketRecord, ID: row, Key: string(row), Reason: reason.Error()}
	}
	payload, err := unframe([]byte(row), value)
	if err != nil {
		return nil, damaged(err)
	}
	if err := proto.Unmarshal(payload, m); err != nil {
		return nil, damaged(err)
	}
	// No record has no state: that would be somebody else's frame.
	if m.State == 0 || m.State > math.MaxUint8 || m.Op > math.MaxUint8 || m.OnPowerCut > math.MaxUint8 {
		return nil, damaged(fmt.Errorf("state %d, op %d, policy %d", m.State, m.Op, m.OnPowerCut))
	}
	return recordFromPB(row, m), nil
}

// declares says whether the record in a row can be read and declares an index
// key, and which one it is. It is decodeRecord for searches, which ask no more.
func declares(row ID, value []byte, key string) (id ID, ok bool) {
	payload, err := unframe([]byte(row), value)
	if err != nil {
		return "", false
	}
	var m recordpb.Keys
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(payload, &m); err != nil || m.State == 0 {
		return "", false
	}
	if id = row; len(m.Id) > 0 {
		id = ID(m.Id)
	}
	ok = len(m.ChainId) > 0 && key == chainIndex(string(m.ChainId))
	for _, v := range m.Values {
		ok = ok || len(v.Index) > 0 && string(v.Index) == key
	}
	return id, ok
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

func recordFromPB(row ID, m *recordpb.Record) *Record {
	r := &Record{
		ID: row, row: row, State: State(m.State), Op: Op(m.Op), Revision: m.Revision,
		Key: text[string](m.Key), Was: text[string](m.Was),
		Parents: fromBytes[ID](m.Parents), Aliases: fromBytes[ID](m.Aliases),
		Retain: m.Retain, Interrupted: m.Interrupted, RetainAfter: m.RetainAfter,
		OnPowerCut: PowerCut(m.OnPowerCut), Durable: m.Durable, Raw: m.Raw,
		Type: text[string](m.Type), Description: text[string](m.Description), Labels: unpair(m.Labels),
		Created: fromInstant(m.Created), LastUsed: fromInstant(m.LastUsed),
		UsageCount: m.UsageCount, Cost: time.Duration(m.Cost), Size: m.Size,
		ChainID: text[digest.Digest](m.ChainId), DiffID: text[digest.Digest](m.DiffId), Verified: m.Verified,
		ImageRefs: fromBytes[string](m.ImageRefs),
		unknown:   m.ProtoReflect().GetUnknown(),
	}
	if len(m.Id) > 0 {
		r.ID = text[ID](m.Id)
	}
	for _, b := range m.Blobs {
		r.Blobs = append(r.Blobs, Blob{
			Digest: text[digest.Digest](b.Digest), MediaType: text[string](b.MediaType), Size: b.Size,
			DiffID: text[digest.Digest](b.DiffId), Annotations: unpair(b.Annotations),
			URLs: fromBytes[string](b.Urls), Stored: b.Stored, Claimed: b.Claimed, unknown: b.ProtoReflect().GetUnknown(),
		})
	}
	for _, v := range m.Values {
		r.Values = append(r.Values, Value{
			Name: text[string](v.Name), Data: v.Data, Index: text[string](v.Index),
			unknown: v.ProtoReflect().GetUnknown(),
		})
	}
	return r
}

// text is a field that was decoded, without a copy: the decoder made one
// already, and nobody but the message has it, which goes or is reset.
func text[S ~string](b []byte) S { return S(unsafe.String(unsafe.SliceData(b), len(b))) }

func toBytes[S ~string](list []S) [][]byte {
	var out [][]byte
	for _, s := range list {
		out = append(out, []byte(s))
	}
	return out
}

func fromBytes[S ~string](list [][]byte) []S {
	var out []S
	for _, b := range list {
		out = append(out, text[S](b))
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

func unpair(list []*recordpb.Pair) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := make(map[string]string, len(list))
	for _, p := range list {
		m[text[string](p.Key)] = text[string](p.Value)
	}
	return m
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
