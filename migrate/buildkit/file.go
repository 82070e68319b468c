package buildkit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// FileMark tells one state of a database from the next.
type FileMark struct {
	// Name is the path below the worker's directory.
	Name        string    `json:"name"`
	Size        int64     `json:"size"`
	ModTime     time.Time `json:"mod_time"`
	Transaction uint64    `json:"transaction"`
}

// database is an open, locked file.
type database struct {
	f    *os.File
	rows *metadata.Foreign
	mark FileMark
}

// openDatabase opens and locks a file, for reading. The lock keeps a daemon
// from starting meanwhile, and is refused while one runs.
func openDatabase(dir, name string) (_ *database, err error) {
	path := filepath.Join(dir, name)
	f, err := os.Open(path)
	if err != nil {
		return nil, classify(err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := lock(f, path, unix.LOCK_SH); err != nil {
		return nil, err
	}
	rows, err := metadata.OpenForeign(f)
	if errors.Is(err, metadata.ErrForeign) {
		err = fmt.Errorf("it is no bbolt database: %w", ErrIncomplete)
	}
	if err != nil {
		return nil, advise(fmt.Errorf("%s: %w", path, classify(err)))
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &database{f: f, rows: rows, mark: FileMark{
		Name: name, Size: rows.Size(), ModTime: info.ModTime().UTC(), Transaction: rows.Transaction(),
	}}, nil
}

func (d *database) close() error { return errors.Join(d.rows.Close(), d.f.Close()) }

// lock takes a flock without waiting.
func lock(f *os.File, path string, how int) error {
	err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, command := holder(f)
		return &LockedError{Path: path, PID: pid, Command: command}
	}
	if err != nil {
		return &os.PathError{Op: "flock", Path: path, Err: err}
	}
	return nil
}

// LockDir takes the worker's directory for one migration; whoever else tries
// meanwhile gets a LockedError. Closing the file gives it back.
func LockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, classify(err)
	}
	if err := lock(f, dir, unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// holder finds who has a flock on f, as far as the kernel shows it to us.
func holder(f *os.File) (pid int, command string) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, ""
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0, ""
	}
	inode := strconv.FormatUint(st.Ino, 10)
	for line := range strings.Lines(string(locks)) {
		// 1: FLOCK  ADVISORY  WRITE 123 fe:00:456 0 EOF. A device number of its
		// own, as btrfs shows it to stat, is not the one in here.
		fields := strings.Fields(line)
		if len(fields) < 6 || fields[1] != "FLOCK" || !strings.HasSuffix(fields[5], ":"+inode) {
			continue
		}
		if n, err := strconv.Atoi(fields[4]); err == nil && n > 0 {
			return n, commandOf(n)
		}
	}
	return 0, ""
}

// commandOf is the command line of a process.
func commandOf(pid int) string {
	const most = 200
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(line) == 0 {
		return "gone meanwhile"
	}
	line = bytes.TrimRight(line[:min(len(line), most)], "\x00")
	return printable(string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
}
