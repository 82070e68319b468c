package cache

import (
	"iter"
	"strings"
)

func cmpString(a, b string) int { return strings.Compare(a, b) }

// some is the beginning of a long list, enough for a message.
func some(ids iter.Seq[ID]) []ID {
	var out []ID
	for id := range ids {
		if out = append(out, id); len(out) == 5 {
			break
		}
	}
	return out
}

func joinIDs(ids []ID) string {
	words := make([]string, len(ids))
	for i, id := range ids {
		words[i] = short(id)
	}
	return strings.Join(words, ", ")
}
