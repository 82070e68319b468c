package metadata_test

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

// drawnRow is a row of the drawing in doc.go.
type drawnRow struct{ bucket, key, value string }

// readDrawing parses the drawing. What it does not understand it refuses, so
// the drawing stays something that can be followed to the letter.
func readDrawing(t *testing.T) []drawnRow {
	t.Helper()
	src, err := os.ReadFile("doc.go")
	require.NoError(t, err)
	var rows []drawnRow
	bucket := ""
	bucketLine := regexp.MustCompile(`^//\t([a-z]+)(\s+header number: .*)?$`)
	rowLine := regexp.MustCompile(`^//\t    (.+?)\s+→ (.+)$`)
	for line := range strings.Lines(string(src)) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "//\tframe(") {
			return rows
		}
		if m := rowLine.FindStringSubmatch(line); m != nil {
			require.NotEmpty(t, bucket)
			rows = append(rows, drawnRow{bucket, m[1], m[2]})
		} else if m := bucketLine.FindStringSubmatch(line); m != nil {
			bucket = m[1]
		}
	}
	t.Fatal("the drawing has no end")
	return nil
}

// matchKey follows the drawing of a key.
func matchKey(drawn string, k []byte) error {
	length := -1
	parts := strings.Split(drawn, ", ")
	for i, part := range parts {
		width := map[string]int{"u8": 1, "u16": 2, "u64": 8}[strings.Fields(part)[0]]
		switch {
		case strings.HasPrefix(part, `"`):
			if string(k) != strings.Trim(part, `"`) {
				return fmt.Errorf("is not %s", part)
			}
			k = nil
		case width > 0 && len(k) < width:
			return fmt.Errorf("ends before %s", part)
		case strings.HasPrefix(part, "u16 length of "):
			length = int(binary.BigEndian.Uint16(k))
			k = k[2:]
		case width > 0:
			k = k[width:]
		case length >= 0:
			if len(k) < length {
				return fmt.Errorf("%s is cut off", part)
			}
			k, length = k[length:], -1
		case i == len(parts)-1:
			if len(k) == 0 && part != "type" {
				return fmt.Errorf("%s is empty", part)
			}
			k = nil
		default:
			return fmt.Errorf("the drawing does not say where %s ends", part)
		}
	}
	if len(k) > 0 {
		return fmt.Errorf("has %d bytes too many", len(k))
	}
	return nil
}

func matchValue(drawn string, k, v []byte) error {
	switch {
	case drawn == "nothing":
		if len(v) != 0 {
			return fmt.Errorf("value has %d bytes", len(v))
		}
	case strings.HasPrefix(drawn, "frame("):
		if len(v) < 5 || v[0] != 1 {
			return fmt.Errorf("value is no frame")
		}
		table := crc32.MakeTable(crc32.Castagnoli)
		if crc32.Update(crc32.Checksum(k, table), table, v[5:]) != binary.BigEndian.Uint32(v[1:]) {
			return fmt.Errorf("checksum is wrong")
		}
	case drawn == "row" || drawn == "what was found in the row":
		if len(v) == 0 {
			return fmt.Errorf("value is empty")
		}
	default:
		return fmt.Errorf("the drawing has value %q", drawn)
	}
	return nil
}

// fillStore makes a store that has something of everything.
func fillStore(t *testing.T, path string) {
	t.Helper()
	s := open(t, path, metadata.Options{})
	create(t, s,
		rec("base", func(r *metadata.Record) {
			r.Aliases = []metadata.ID{"twin"}
			r.ChainID, r.DiffID = "sha256:c", "sha256:d"
			r.Blobs = []metadata.Blob{{Digest: "sha256:b", MediaType: "m", Size: 3, Annotations: map[string]string{"a": "b"}, URLs: []string{"u"}}}
			r.Labels = map[string]string{"l": "v", "\xff": "\x00"}
			r.ImageRefs, r.Description = []string{"ref"}, "d"
			r.Created, r.LastUsed, r.UsageCount, r.Cost = time.Unix(1, 2), time.Unix(3, 4), 5, 6
		}),
		rec(s.NewID(), over("base"), indexed("one", "two\x00", strings.Repeat("x", metadata.MaxIndexLen))),
		rec("c2", over("base"), func(r *metadata.Record) { r.State, r.Type = metadata.Committed, "" }),
		rec("was", func(r *metadata.Record) { r.Was, r.Durable = "former", false }),
		rec("lazy", func(r *metadata.Record) { r.State, r.Key, r.Op = metadata.Lazy, "", metadata.Merge }, over("base", "c2")),
		rec("broken"),
	)
	update(t, s, func(tx *metadata.Tx) error {
		if err := tx.SetMeta(metadata.Meta{Driver: "overlay", BootID: "b"}); err != nil {
			return err
		}
		if err := tx.SetAttachment("base", "hash", []byte("h")); err != nil {
			return err
		}
		return tx.SetAttachment("c2", "empty", nil)
	})
	s.Touch("base", time.Unix(9, 9))
	require.NoError(t, s.Close())
	raw(t, path, func(tx *bolt.Tx) error { return tx.Bucket([]byte("record")).Put([]byte("broken"), []byte("rubbish")) })
	s, err := metadata.Open(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	update(t, s, func(tx *metadata.Tx) error {
		keys, err := tx.Quarantine("broken")
		require.Equal(t, []string{"key-broken"}, keys)
		return err
	})
	require.NoError(t, s.Close())
}

func TestEveryRowIsDrawn(t *testing.T) {
	path := storePath(t)
	fillStore(t, path)
	drawing := readDrawing(t)
	require.Len(t, drawing, 12)

	seen := map[drawnRow]int{}
	raw(t, path, func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				why := fmt.Errorf("bucket %s is not in the drawing", name)
				for _, row := range drawing {
					if row.bucket != string(name) || v == nil {
						continue
					}
					if why = matchKey(row.key, k); why == nil {
						why = matchValue(row.value, k, v)
					}
					if why == nil {
						seen[row]++
						return nil
					}
				}
				return fmt.Errorf("bucket %s, key %q: %w", name, k, why)
			})
		})
	})
	for _, row := range drawing {
		require.NotZero(t, seen[row], "nothing in the file is drawn as %v", row)
	}
}
