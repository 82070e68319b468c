package snapshot

import (
	"os"
	"strconv"
	"syscall"
)

// For tests in package snapshot_test.
var (
	CopyTree   = copyTree
	RemoveTree = removeTree
	EncodeKey  = encodeKey
	DecodeKey  = decodeKey
)

// Base36 is the name of the short link to a directory.
func Base36(fi os.FileInfo) string {
	return strconv.FormatUint(fi.Sys().(*syscall.Stat_t).Ino, 36)
}
