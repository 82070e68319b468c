package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// frameV1 is the format byte of the only frame there is: the format, four
// bytes of CRC-32C (big endian) over the row's key and the payload, and the
// payload. Protobuf decodes most damaged bytes without complaint, hence the
// sum; the key is in it so that a value at another key is noticed, too.
const frameV1 = 1

const frameHeader = 5

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func frameSum(key, payload []byte) uint32 {
	table := castagnoli()
	return crc32.Update(crc32.Checksum(key, table), table, payload)
}

// frame wraps the payload of the row with the given key.
func frame(key, payload []byte) []byte {
	b := append(make([]byte, frameHeader, frameHeader+len(payload)), payload...)
	fillFrame(key, b)
	return b
}

// fillFrame completes a frame whose payload is there, behind room for a header.
func fillFrame(key, b []byte) {
	b[0] = frameV1
	binary.BigEndian.PutUint32(b[1:], frameSum(key, b[frameHeader:]))
}

// unframe checks a value and returns its payload, which shares its memory.
func unframe(key, value []byte) ([]byte, error) {
	switch {
	case len(value) == 0:
		return nil, errors.New("empty value")
	case value[0] != frameV1:
		return nil, fmt.Errorf("format byte %#02x", value[0])
	case len(value) < frameHeader:
		return nil, fmt.Errorf("cut off after %d bytes", len(value))
	}
	payload := value[frameHeader:]
	if want, got := binary.BigEndian.Uint32(value[1:]), frameSum(key, payload); want != got {
		return nil, fmt.Errorf("checksum %08x, content has %08x", want, got)
	}
	return payload, nil
}
