package contenthash

import (
	"encoding/binary"
	"syscall"
)

// syscallStat is what package os puts into a FileInfo.
type syscallStat = syscall.Stat_t

func nativeUint16(b []byte) uint16 { return binary.NativeEndian.Uint16(b) }
