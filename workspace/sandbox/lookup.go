package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// defaultPath is where a command is looked up when its environment has no
// PATH; it is the C library's.
const defaultPath = "/bin:/usr/bin"

// lookUp finds the file of a command the way execvp(3) does: the first
// executable regular file in PATH, and if there is none the error of one that
// is there but may not be executed.
func lookUp(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	path := defaultPath
	for _, entry := range env {
		if value, ok := strings.CutPrefix(entry, "PATH="); ok {
			path = value
		}
	}
	var denied error
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		// Not Join: a command "x" in "." must stay "./x" for its scripts.
		file := dir + "/" + name
		err := executable(file)
		if err == nil {
			return file, nil
		}
		// A directory that may not be searched has no command, as for shells.
		if _, there := os.Stat(file); denied == nil && there == nil {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", fmt.Errorf("not found in PATH: %w", unix.ENOENT)
}

// executable says why path is not a file that can be executed.
func executable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return &os.PathError{Op: "exec", Path: path, Err: unix.EISDIR}
	}
	// A command that is root needs one execute bit, too; the kernel decides.
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS); err != nil {
		return &os.PathError{Op: "exec", Path: path, Err: err}
	}
	return nil
}
