package fsat

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
)

// RealPath is path made absolute with its links resolved, as far as it exists
// and may be looked at. It is for comparing places that the caller named, not
// for opening what is below an untrusted tree.
func RealPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	rest := ""
	for p := abs; ; p = filepath.Dir(p) {
		real, err := filepath.EvalSymlinks(p)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		known := errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || Absent(err)
		if !known || p == "/" {
			return "", Error("resolve", path, err)
		}
		rest = filepath.Join(filepath.Base(p), rest)
	}
}

// Inside says whether path is dir or below it; both are clean and absolute.
func Inside(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
