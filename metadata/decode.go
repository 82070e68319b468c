package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unsafe"

	digest "github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"
)

// This file reads records without the generated messages, which write them:
// those allocate each field on its own, and then nearly all of the time that a
// list of all records takes is theirs. Here a record is one copy of its row and
// what points into it. A test holds both against each other.

// decodeRecord returns the record of the framed value of a row. It shares no
// memory with it. An error can name the record by its row only.
func decodeRecord(row ID, value []byte) (*Record, error) {
	return decodeOwned(row, bytes.Clone(value))
}

// decodeOwned is decodeRecord of a value that nobody else has: the record is
// made of it.
func decodeOwned(row ID, value []byte) (*Record, error) {
	payload, err := unframe([]byte(row), value)
	d := recordDecoder{r: &Record{ID: row, row: row}}
	if err == nil {
		d.r.unknown, err = fields(payload, d.field)
	}
	// No record has no state: that would be somebody else's frame.
	if err == nil && (d.state == 0 || max(d.state, d.op, d.onPowerCut) > math.MaxUint8) {
		err = fmt.Errorf("state %d, op %d, policy %d", d.state, d.op, d.onPowerCut)
	}
	if err != nil {
		return nil, &DamagedError{Bucket: bucketRecord, ID: row, Key: string(row), Reason: err.Error()}
	}
	d.r.State, d.r.Op, d.r.OnPowerCut = State(d.state), Op(d.op), PowerCut(d.onPowerCut)
	d.r.Created, d.r.LastUsed = d.created.time(), d.lastUsed.time()
	return d.r, nil
}

// declares says whether the record in a row can be read and declares an index
// key, and which one it is. It is decodeRecord for searches: they ask no more,
// and nothing is copied for them but the id.
func declares(row ID, value []byte, key string) (id ID, ok bool) {
	payload, err := unframe([]byte(row), value)
	if err != nil {
		return "", false
	}
	chain, isChain := strings.CutPrefix(key, chainPrefix)
	index := func(f field) (bool, error) {
		ok = ok || f.kind == protowire.BytesType && f.number == 3 && len(f.b) > 0 && string(f.b) == key
		return true, nil
	}
	var state uint64
	id = row
	_, err = fields(payload, func(f field) (_ bool, err error) {
		switch {
		case f.kind == protowire.VarintType && f.number == 1:
			state = f.n
		case f.kind != protowire.BytesType:
		case f.number == 22:
			ok = ok || isChain && len(f.b) > 0 && string(f.b) == chain
		case f.number == 27:
			_, err = fields(f.b, index)
		case f.number == 29 && len(f.b) > 0:
			id = ID(f.b)
		}
		return true, err
	})
	return id, ok && err == nil && state != 0
}

// A field is one number's value, as it is written: a number, or bytes.
type field struct {
	number protowire.Number
	kind   protowire.Type
	n      uint64
	b      []byte
}

// fields calls known for all fields of a message, and collects those that it
// says no to, with their tags.
func fields(b []byte, known func(field) (bool, error)) (unknown []byte, err error) {
	for len(b) > 0 {
		var f field
		var tag, n int
		if f.number, f.kind, tag = protowire.ConsumeTag(b); tag < 0 {
			return nil, protowire.ParseError(tag)
		}
		switch value := b[tag:]; f.kind {
		case protowire.VarintType:
			f.n, n = protowire.ConsumeVarint(value)
		case protowire.BytesType:
			f.b, n = protowire.ConsumeBytes(value)
		default:
			n = protowire.ConsumeFieldValue(f.number, f.kind, value)
		}
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		if f.number > protowire.MaxValidNumber {
			return nil, errors.New("invalid field number")
		}
		ok, err := known(f)
		if err != nil {
			return nil, err
		}
		if !ok {
			// A tag may have been written longer than it need be.
			unknown = append(protowire.AppendTag(unknown, f.number, f.kind), b[tag:tag+n]...)
		}
		b = b[tag+n:]
	}
	return unknown, nil
}

// text is the value of a field, without a copy: nobody writes to it.
func text[S ~string](f field) S { return S(unsafe.String(unsafe.SliceData(f.b), len(f.b))) }

// data is the value of a field that callers may write to.
func (f *field) data() []byte {
	if len(f.b) == 0 {
		return nil
	}
	return slices.Clip(f.b)
}

// recordDecoder is a record that is being read.
type recordDecoder struct {
	r                     *Record
	state, op, onPowerCut uint32
	created, lastUsed     instant
}

// field takes a field of the message Record.
func (d *recordDecoder) field(f field) (bool, error) {
	switch f.kind {
	case protowire.VarintType:
		return d.number(f), nil
	case protowire.BytesType:
		return d.bytes(f)
	}
	return false, nil
}

func (d *recordDecoder) number(f field) bool {
	switch r := d.r; f.number {
	case 1:
		d.state = uint32(f.n)
	case 2:
		d.op = uint32(f.n)
	case 3:
		r.Revision = f.n
	case 8:
		r.Retain = f.n != 0
	case 9:
		r.Interrupted = f.n != 0
	case 10:
		r.RetainAfter = f.n != 0
	case 11:
		d.onPowerCut = uint32(f.n)
	case 12:
		r.Durable = f.n != 0
	case 13:
		r.Raw = f.n != 0
	case 19:
		r.UsageCount = f.n
	case 20:
		r.Cost = time.Duration(f.n)
	case 21:
		r.Size = protowire.DecodeZigZag(f.n)
	case 24:
		r.Verified = f.n != 0
	default:
		return false
	}
	return true
}

func (d *recordDecoder) bytes(f field) (_ bool, err error) {
	switch r := d.r; f.number {
	case 4:
		r.Key = text[string](f)
	case 5:
		r.Was = text[string](f)
	case 6:
		r.Parents = append(r.Parents, text[ID](f))
	case 7:
		r.Aliases = append(r.Aliases, text[ID](f))
	case 14:
		r.Type = text[string](f)
	case 15:
		r.Description = text[string](f)
	case 16:
		r.Labels, err = addPair(r.Labels, f)
	case 17:
		err = d.created.decode(f)
	case 18:
		err = d.lastUsed.decode(f)
	case 22:
		r.ChainID = text[digest.Digest](f)
	case 23:
		r.DiffID = text[digest.Digest](f)
	case 25:
		err = d.blob(f)
	case 26:
		r.ImageRefs = append(r.ImageRefs, text[string](f))
	case 27:
		err = d.value(f)
	case 29:
		if r.ID = text[ID](f); r.ID == "" {
			r.ID = r.row
		}
	default:
		return false, nil
	}
	return true, err
}

func (d *recordDecoder) blob(in field) (err error) {
	var b Blob
	b.unknown, err = fields(in.b, func(f field) (_ bool, err error) {
		switch {
		case f.kind == protowire.VarintType && f.number == 3:
			b.Size = int64(f.n)
		case f.kind == protowire.VarintType && f.number == 7:
			b.Stored = f.n != 0
		case f.kind == protowire.VarintType && f.number == 8:
			b.Claimed = f.n != 0
		case f.kind != protowire.BytesType:
			return false, nil
		case f.number == 1:
			b.Digest = text[digest.Digest](f)
		case f.number == 2:
			b.MediaType = text[string](f)
		case f.number == 4:
			b.DiffID = text[digest.Digest](f)
		case f.number == 5:
			b.Annotations, err = addPair(b.Annotations, f)
		case f.number == 6:
			b.URLs = append(b.URLs, text[string](f))
		default:
			return false, nil
		}
		return true, err
	})
	d.r.Blobs = append(d.r.Blobs, b)
	return err
}

func (d *recordDecoder) value(in field) (err error) {
	var v Value
	v.unknown, err = fields(in.b, func(f field) (bool, error) {
		switch {
		case f.kind != protowire.BytesType:
			return false, nil
		case f.number == 1:
			v.Name = text[string](f)
		case f.number == 2:
			v.Data = f.data()
		case f.number == 3:
			v.Index = text[string](f)
		default:
			return false, nil
		}
		return true, nil
	})
	d.r.Values = append(d.r.Values, v)
	return err
}

// addPair adds an entry to a map, which it makes for the first one.
func addPair(m map[string]string, in field) (map[string]string, error) {
	var key, value string
	_, err := fields(in.b, func(f field) (bool, error) {
		switch {
		case f.kind == protowire.BytesType && f.number == 1:
			key = text[string](f)
		case f.kind == protowire.BytesType && f.number == 2:
			value = text[string](f)
		}
		return true, nil
	})
	if m == nil {
		m = map[string]string{}
	}
	m[key] = value
	return m, err
}

// instant is a point in time, as it is written.
type instant struct {
	set     bool
	seconds int64
	nanos   int32
}

func (i *instant) decode(in field) error {
	i.set = true
	_, err := fields(in.b, func(f field) (bool, error) {
		switch {
		case f.kind == protowire.VarintType && f.number == 1:
			i.seconds = int64(f.n)
		case f.kind == protowire.VarintType && f.number == 2:
			i.nanos = int32(f.n)
		}
		return true, nil
	})
	return err
}

func (i *instant) time() time.Time {
	if !i.set {
		return time.Time{}
	}
	return time.Unix(i.seconds, int64(i.nanos)).UTC()
}
