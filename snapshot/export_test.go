package snapshot

// For tests in package snapshot_test.
var (
	CopyTree   = copyTree
	RemoveTree = removeTree
	EncodeKey  = encodeKey
	DecodeKey  = decodeKey
)
