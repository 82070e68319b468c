package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// diskSize is that of a file system, in bytes, for subjects with a state of
// records each: some 10 inodes for each record, of 4 KiB as the file system
// counts them, and the trees beside them, which are the most up to 10,000.
func diskSize(records, subjects int) int64 {
	return max(3<<30, 1<<30+int64(records)*int64(subjects)*12*4096)
}

// withLoopDisk runs do with the root of a new ext4 file system, in a file of
// size bytes below dir that has all its blocks. Only there are two runs alike: the age of
// a file system decides how dear a new inode is, and one that discards makes
// inodes several times dearer for minutes after a mass removal. It needs root.
func withLoopDisk(ctx context.Context, dir string, size int64, do func(root string) error) (err error) {
	dir, err = os.MkdirTemp(dir, "lamina-bench-disk-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	image, root := filepath.Join(dir, "image"), filepath.Join(dir, "root")
	if err := writeZeros(ctx, image, size); err != nil {
		return fmt.Errorf("make a disk of %d MiB: %w", size>>20, err)
	}
	if err := os.Mkdir(root, 0o700); err != nil {
		return err
	}
	// What ext4 puts off to the background after the first mount is done now.
	const now = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
	if err := command(ctx, "mkfs.ext4", "-q", "-F", "-i", "4096", "-E", now, image); err != nil {
		return err
	}
	if err := command(ctx, "mount", "-o", "loop,nodiscard", image, root); err != nil {
		return err
	}
	// An interrupted bench must leave no mount either.
	defer func() { err = errors.Join(err, command(context.WithoutCancel(ctx), "umount", root)) }()
	return do(root)
}

// writeZeros makes a file with nothing but zeros that are really written:
// blocks that are only reserved are dearer at their first write.
func writeZeros(ctx context.Context, path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	zeros := make([]byte, 4<<20)
	for at := int64(0); at < size && err == nil; at += int64(len(zeros)) {
		if err = ctx.Err(); err == nil {
			_, err = f.Write(zeros)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, firstLine(out))
	}
	return nil
}

// firstLine is what a command complained of first: cp does so for each file.
func firstLine(out []byte) []byte {
	line, _, _ := bytes.Cut(bytes.TrimSpace(out), []byte("\n"))
	return line
}
