package snapshot

import (
	"os"
	"syscall"
)

// For tests in package snapshot_test.
var (
	CopyTree   = copyTree
	RemoveTree = removeTree
	EncodeKey  = encodeKey
	DecodeKey  = decodeKey
)

// ShortName is the name of the short link to a directory.
func ShortName(fi os.FileInfo) string {
	return shortNumber(fi.Sys().(*syscall.Stat_t).Ino)
}
