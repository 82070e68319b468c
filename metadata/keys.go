package metadata

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// The buckets. Their keys and values are drawn in doc.go.
const (
	bucketMeta       = "meta"
	bucketRecord     = "record"
	bucketIndex      = "index"
	bucketChild      = "child"
	bucketSnapshot   = "snapshot"
	bucketBlob       = "blob"
	bucketUnsettled  = "unsettled"
	bucketTotal      = "total"
	bucketAlias      = "alias"
	bucketAttachment = "attachment"
	bucketQuarantine = "quarantine"
)

// buckets lists all of them, in the order of doc.go.
func buckets() []string {
	return []string{
		bucketMeta, bucketRecord, bucketIndex, bucketChild, bucketSnapshot, bucketBlob,
		bucketUnsettled, bucketTotal, bucketAlias, bucketAttachment, bucketQuarantine,
	}
}

// Keys of the bucket meta.
const (
	keySchema = "schema"
	keyStore  = "store"
)

// pairKey joins two byte strings so that they can be told apart whatever
// bytes they hold: the length of the first one, two bytes, goes ahead. A
// fixed width has one encoding per key, where a varint has many.
func pairKey(first, second string) []byte {
	k := make([]byte, 0, 2+len(first)+len(second))
	k = binary.BigEndian.AppendUint16(k, uint16(len(first)))
	k = append(k, first...)
	return append(k, second...)
}

// pairString is pairKey as a string.
func pairString(first, second string) string {
	var k strings.Builder
	k.Grow(2 + len(first) + len(second))
	_ = k.WriteByte(byte(len(first) >> 8)) // a Builder has no errors
	_ = k.WriteByte(byte(len(first)))
	k.WriteString(first)
	k.WriteString(second)
	return k.String()
}

// pairPrefix is what the keys of all pairs with this first half start with.
func pairPrefix(first string) []byte { return pairKey(first, "") }

// splitPair undoes pairKey.
func splitPair(k []byte) (first, second string, ok bool) {
	if len(k) < 2 {
		return "", "", false
	}
	n := int(binary.BigEndian.Uint16(k))
	if len(k) < 2+n {
		return "", "", false
	}
	return string(k[2 : 2+n]), string(k[2+n:]), true
}

// totalKey names a row of the bucket total.
func totalKey(g group) []byte {
	shared := byte(0)
	if g.shared {
		shared = 1
	}
	return append([]byte{byte(g.state), shared}, g.typ...)
}

func splitTotal(k []byte) (group, bool) {
	if len(k) < 2 || k[1] > 1 {
		return group{}, false
	}
	return group{state: State(k[0]), shared: k[1] == 1, typ: string(k[2:])}, true
}

// attachmentKey names a row of the bucket attachment.
func attachmentKey(row ID, name string) []byte { return pairKey(string(row), name) }

func splitAttachment(k []byte) (row ID, name string, ok bool) {
	first, name, ok := splitPair(k)
	return ID(first), name, ok && first != "" && name != ""
}

// chainPrefix begins the index key under which a record with a ChainID is found.
const chainPrefix = "chainid:"

func chainIndex(chainID string) string { return chainPrefix + chainID }

// printable quotes a key for a message.
func printable(k []byte) string {
	if len(k) > 64 {
		return fmt.Sprintf("%q... (%d bytes)", k[:64], len(k))
	}
	return fmt.Sprintf("%q", k)
}
