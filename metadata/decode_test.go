package metadata

import (
	"fmt"
	"math"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/metadata/internal/recordpb"
)

// decodeByMessage is decodeRecord by the generated messages.
func decodeByMessage(row ID, payload []byte) (*Record, error) {
	var m recordpb.Record
	if err := proto.Unmarshal(payload, &m); err != nil {
		return nil, err
	}
	if m.State == 0 || m.State > math.MaxUint8 || m.Op > math.MaxUint8 || m.OnPowerCut > math.MaxUint8 {
		return nil, fmt.Errorf("state %d, op %d, policy %d", m.State, m.Op, m.OnPowerCut)
	}
	r := &Record{
		ID: row, row: row, State: State(m.State), Op: Op(m.Op), Revision: m.Revision,
		Key: string(m.Key), Was: string(m.Was), Parents: fromBytes[ID](m.Parents), Aliases: fromBytes[ID](m.Aliases),
		Retain: m.Retain, Interrupted: m.Interrupted, RetainAfter: m.RetainAfter,
		OnPowerCut: PowerCut(m.OnPowerCut), Durable: m.Durable, Raw: m.Raw,
		Type: string(m.Type), Description: string(m.Description), Labels: unpair(m.Labels),
		Created: fromInstant(m.Created), LastUsed: fromInstant(m.LastUsed),
		UsageCount: m.UsageCount, Cost: time.Duration(m.Cost), Size: m.Size,
		ChainID: digest.Digest(m.ChainId), DiffID: digest.Digest(m.DiffId), Verified: m.Verified,
		ImageRefs: fromBytes[string](m.ImageRefs), unknown: noneIfEmpty(m.ProtoReflect().GetUnknown()),
	}
	if len(m.Id) > 0 {
		r.ID = ID(m.Id)
	}
	for _, b := range m.Blobs {
		r.Blobs = append(r.Blobs, Blob{
			Digest: digest.Digest(b.Digest), MediaType: string(b.MediaType), Size: b.Size,
			DiffID: digest.Digest(b.DiffId), Annotations: unpair(b.Annotations), URLs: fromBytes[string](b.Urls),
			Stored: b.Stored, Claimed: b.Claimed, unknown: noneIfEmpty(b.ProtoReflect().GetUnknown()),
		})
	}
	for _, v := range m.Values {
		r.Values = append(r.Values, Value{
			Name: string(v.Name), Data: noneIfEmpty(v.Data), Index: string(v.Index),
			unknown: noneIfEmpty(v.ProtoReflect().GetUnknown()),
		})
	}
	return r, nil
}

func noneIfEmpty(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}

func fromBytes[S ~string](list [][]byte) (out []S) {
	for _, b := range list {
		out = append(out, S(b))
	}
	return out
}

func unpair(list []*recordpb.Pair) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := map[string]string{}
	for _, p := range list {
		m[string(p.Key)] = string(p.Value)
	}
	return m
}

// requireSameDecoding holds what we read of a payload against the generated
// messages: the record, or that there is none.
func requireSameDecoding(t require.TestingT, payload []byte) {
	want, wantErr := decodeByMessage("row", payload)
	got, err := decodeRecord("row", frame([]byte("row"), payload))
	if wantErr != nil {
		require.ErrorIs(t, err, ErrDamaged, "%x", payload)
		return
	}
	require.NoError(t, err, "%x", payload)
	require.Equal(t, want, got, "%x", payload)
}

// wireMessage draws the bytes of a message: mostly fields that it has, and
// others, with any type, each as often as it comes.
func wireMessage(t *rapid.T, d protoreflect.MessageDescriptor, depth int) (b []byte) {
	fields := d.Fields()
	for range rapid.IntRange(0, 4+fields.Len()).Draw(t, "fields") {
		number := fields.Get(rapid.IntRange(0, fields.Len()-1).Draw(t, "field")).Number()
		if rapid.IntRange(0, 9).Draw(t, "other number") == 0 {
			number = rapid.SampledFrom([]protowire.Number{28, 31, protowire.MaxValidNumber, protowire.MaxValidNumber + 1}).Draw(t, "number")
		}
		var inner protoreflect.MessageDescriptor
		kind := protowire.BytesType
		if f := fields.ByNumber(number); f != nil && f.Kind() == protoreflect.MessageKind {
			inner = f.Message()
		} else if f != nil && f.Kind() != protoreflect.BytesKind {
			kind = protowire.VarintType
		}
		if rapid.IntRange(0, 9).Draw(t, "other type") == 0 {
			kind = rapid.SampledFrom([]protowire.Type{
				protowire.VarintType, protowire.BytesType, protowire.Fixed32Type, protowire.Fixed64Type, protowire.StartGroupType,
			}).Draw(t, "type")
		}
		b = protowire.AppendTag(b, number, kind)
		switch kind {
		case protowire.VarintType:
			b = protowire.AppendVarint(b, varint(t))
		case protowire.Fixed32Type:
			b = protowire.AppendFixed32(b, 7)
		case protowire.Fixed64Type:
			b = protowire.AppendFixed64(b, 7)
		case protowire.StartGroupType:
			b = protowire.AppendVarint(protowire.AppendTag(b, 1, protowire.VarintType), 1)
			b = protowire.AppendTag(b, number, protowire.EndGroupType)
		default:
			var value []byte
			if inner == nil || rapid.IntRange(0, 19).Draw(t, "no message") == 0 {
				value = []byte(rapid.StringN(0, 3, 5).Draw(t, "text"))
			} else if depth > 0 {
				value = wireMessage(t, inner, depth-1)
			}
			b = protowire.AppendBytes(b, value)
		}
	}
	return b
}

// varint draws a number, seldom one that is too large for a state.
func varint(t *rapid.T) uint64 {
	if rapid.IntRange(0, 19).Draw(t, "large") == 0 {
		return rapid.Uint64().Draw(t, "number")
	}
	return rapid.Uint64Range(0, 255).Draw(t, "number")
}

// TestDecodesAsMessages: whatever is written in fields, several times, in any
// order and with any type, it is read as the generated messages read it.
func TestDecodesAsMessages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		payload := wireMessage(t, new(recordpb.Record).ProtoReflect().Descriptor(), 2)
		if rapid.Bool().Draw(t, "has a state") {
			payload = append(payload, 8, byte(rapid.IntRange(1, 4).Draw(t, "state")))
		}
		if cut := rapid.IntRange(0, 9).Draw(t, "cut"); cut == 0 && len(payload) > 0 {
			payload = payload[:rapid.IntRange(0, len(payload)-1).Draw(t, "length")]
		}
		requireSameDecoding(t, payload)
	})
}

// TestDecodedDataIsTheCallers: what a caller writes to the data of a value, or
// appends to it, is in no other field.
func TestDecodedDataIsTheCallers(t *testing.T) {
	b, err := encodeRecord(&Record{
		ID: "r", row: "r", State: Committed, Op: Base, Size: SizeUnknown,
		Values: []Value{{Name: "a", Data: []byte("first"), Index: "i"}, {Name: "b", Data: []byte("second")}},
	})
	require.NoError(t, err)
	r, err := decodeRecord("r", b)
	require.NoError(t, err)
	before := append([]byte(nil), b...)
	_ = append(r.Values[0].Data, "xxxxxxxx"...)
	copy(r.Values[0].Data, "FIRST")
	require.Equal(t, "i", r.Values[0].Index)
	require.Equal(t, "second", string(r.Values[1].Data))
	require.Equal(t, before, b)
}
