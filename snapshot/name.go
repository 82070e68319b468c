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
	if name := escapeKey(key); len(name) <= maxName {
		return name
	}
	sum := sha256.Sum256([]byte(key))
	return "~" + hex.EncodeToString(sum[:])
}

// escapeKey is a key without bytes that mean something in names.
func escapeKey(key string) string {
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
	return b.String()
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
	key = unescapeKey(name)
	return key, key != "" && encodeKey(key) == name
}

// unescapeKey is the inverse of escapeKey, and empty for what that cannot give.
func unescapeKey(name string) string {
	if !strings.Contains(name, "%") {
		return name
	}
	var b strings.Builder
	for i := 0; i < len(name); i++ {
		if name[i] != '%' {
			b.WriteByte(name[i])
			continue
		}
		if i+2 >= len(name) {
			return ""
		}
		c, err := hex.DecodeString(name[i+1 : i+3])
		if err != nil {
			return ""
		}
		b.WriteByte(c[0])
		i += 2
	}
	return b.String()
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

// These begin, behind the last "~" of a name in trash, what says that this is
// no entry but the data directory of an adopted snapshot that had none; one
// that is going is being deleted. The letter of trashName and the escaped name
// of the directory follow.
const (
	movedTag = "m"
	goingTag = "g"
)

// movedName is a name for trash for the data of an adopted snapshot.
func movedName(a adoption) string {
	tag := "c"
	if a.active {
		tag = "a"
	}
	return a.name + "~" + movedTag + tag + escapeKey(a.dir)
}

// splitMoved is the inverse of movedName; going is the name that the same data
// has once it is being deleted.
func splitMoved(trash string) (dir, going string, ok bool) {
	if _, known := splitTrash(trash); !known {
		return "", "", false
	}
	i := strings.LastIndexByte(trash, '~') + 1
	rest := trash[i+1:]
	if tag := trash[i : i+1]; tag != movedTag && tag != goingTag {
		return "", "", false
	}
	return unescapeKey(rest[1:]), trash[:i] + goingTag + rest, true
}

// moved says whether a name in trash is that of data without an entry.
func moved(trash string) bool {
	_, _, ok := splitMoved(trash)
	return ok
}

// splitTrash is the inverse of trashName, and of movedName as far as that says
// where the snapshot was.
func splitTrash(trash string) (from entry, ok bool) {
	i := strings.LastIndexByte(trash, '~')
	if i < 0 || i+1 >= len(trash) || !entryName(trash[:i]) {
		return entry{}, false
	}
	tag := trash[i+1:]
	if (tag[:1] == movedTag || tag[:1] == goingTag) && len(tag) > 1 {
		tag = tag[1:]
	}
	switch tag[0] {
	case 'a':
		return entry{dirActive, trash[:i]}, true
	case 'c':
		return entry{dirCommitted, trash[:i]}, true
	}
	return entry{}, false
}
