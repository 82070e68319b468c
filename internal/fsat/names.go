package fsat

import (
	"crypto/rand"
	"strings"
)

const (
	tempPrefix = ".lamina-"
	tempSuffix = ".tmp"
)

// TempName is a fresh name for a file that is being made beside the one it
// will become.
func TempName() string { return tempPrefix + rand.Text() + tempSuffix }

// IsTemp says whether TempName may have made name. Such a file is under way or
// was left by a kill; it is never content.
func IsTemp(name string) bool {
	return len(name) == len(tempPrefix)+26+len(tempSuffix) &&
		strings.HasPrefix(name, tempPrefix) && strings.HasSuffix(name, tempSuffix)
}
