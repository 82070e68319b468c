package bench

import (
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
)

// Footprint is what lies in a directory or, as a difference, what an operation
// made there.
type Footprint struct {
	// Inodes are files of all kinds, Links the names that they have beyond one
	// each, and Bytes what they occupy on the disk.
	Inodes, Links, Bytes int64
}

// footprint measures all below dir but what is mounted there.
func footprint(dir string) (f Footprint, err error) {
	seen := map[uint64]bool{}
	var device uint64
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed in the background
		}
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if path == dir {
			device = st.Dev
		}
		switch {
		case st.Dev != device:
			if d.IsDir() {
				return fs.SkipDir
			}
		case seen[st.Ino]:
			f.Links++
		default:
			seen[st.Ino] = true
			f.Inodes++
			f.Bytes += st.Blocks * 512
		}
		return nil
	})
	return f, err
}

func (f Footprint) minus(other Footprint) Footprint {
	return Footprint{f.Inodes - other.Inodes, f.Links - other.Links, f.Bytes - other.Bytes}
}
