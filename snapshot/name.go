package snapshot

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// maxName is how long an encoded key may be. With "~", a letter and the
// random part it stays below the 255 bytes that file systems take.
const maxName = 200

// encodeKey is the directory name of a key.
func encodeKey(key string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(key) {
		c := key[i]
		if plain(c) && (c != '.' || i > 0) {
			b.WriteByte(c)
			continue
		}
		b.WriteByte('%')
		b.WriteByte(digits[c>>4])
		b.WriteByte(digits[c&15])
	}
	if b.Len() <= maxName {
		return b.String()
	}
	sum := sha256.Sum256([]byte(key))
	return "~" + hex.EncodeToString(sum[:])
}

func plain(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		c == '.' || c == '_' || c == '-'
}

// hashed says whether a directory name is the digest of a key rather than
// the key itself.
func hashed(name string) bool {
	sum, ok := strings.CutPrefix(name, "~")
	if !ok || len(sum) != 2*sha256.Size {
		return false
	}
	return strings.Trim(sum, "0123456789abcdef") == ""
}

// decodeKey is the key of a directory name; ok is false for hashed names and
// for names that encodeKey does not give.
func decodeKey(name string) (key string, ok bool) {
	var b strings.Builder
	for i := 0; i < len(name); i++ {
		if name[i] != '%' {
			b.WriteByte(name[i])
			continue
		}
		if i+2 >= len(name) {
			return "", false
		}
		c, err := hex.DecodeString(name[i+1 : i+3])
		if err != nil {
			return "", false
		}
		b.WriteByte(c[0])
		i += 2
	}
	key = b.String()
	return key, key != "" && encodeKey(key) == name
}

// entryName says whether a directory name is one that encodeKey gives.
func entryName(name string) bool {
	_, ok := decodeKey(name)
	return ok || hashed(name)
}

// randomName is a name for new: unique, and says for whom.
func randomName(name string) string { return name + "~" + rand.Text() }

// trashName is a name for trash, which also says where the entry was.
func trashName(e entry) string {
	tag := "~a"
	if e.dir == dirCommitted {
		tag = "~c"
	}
	return e.name + tag + rand.Text()
}

// splitTrash is the inverse of trashName.
func splitTrash(trash string) (from entry, ok bool) {
	i := strings.LastIndexByte(trash, '~')
	if i < 0 || i+1 >= len(trash) || !entryName(trash[:i]) {
		return entry{}, false
	}
	switch trash[i+1] {
	case 'a':
		return entry{dirActive, trash[:i]}, true
	case 'c':
		return entry{dirCommitted, trash[:i]}, true
	}
	return entry{}, false
}
