package legacytest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listing is the canonical form of a tree, one line per entry: path, type,
// mode, owners, size, digest, link, attributes. Times, link counts and device
// numbers are left out.
func Listing(root string) (string, error) {
	var lines []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		line, err := listed(root, path)
		lines = append(lines, line)
		return err
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n", err
}

// Sum is the digest of a listing, as in Record.Tree.
func Sum(listing string) string {
	sum := sha256.Sum256([]byte(listing))
	return hex.EncodeToString(sum[:])
}

func listed(root, path string) (string, error) {
	rel, err := filepath.Rel(root, path)
	if err != nil {
		return "", err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	st := info.Sys().(*syscall.Stat_t)
	types := map[uint32]string{
		syscall.S_IFREG: "f", syscall.S_IFDIR: "d", syscall.S_IFLNK: "l", syscall.S_IFIFO: "p",
		syscall.S_IFCHR: "c", syscall.S_IFBLK: "b", syscall.S_IFSOCK: "s",
	}
	typ := types[st.Mode&syscall.S_IFMT]
	size, sum, link := int64(0), "-", "-"
	switch typ {
	case "f":
		data, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		digest := sha256.Sum256(data)
		size, sum = st.Size, hex.EncodeToString(digest[:])
	case "l":
		target, err := os.Readlink(path)
		if err != nil {
			return "", err
		}
		link = fmt.Sprintf("%q", target)
	}
	attrs, err := attributes(path)
	return fmt.Sprintf("%q %s %04o %d:%d %d %s %s %s", rel, typ, st.Mode&0o7777, st.Uid, st.Gid, size, sum, link, attrs), err
}

func attributes(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return "", err
	}
	var out []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if !strings.HasPrefix(name, "user.") && name != "security.capability" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", err
		}
		out = append(out, name+"="+hex.EncodeToString(value[:n]))
	}
	slices.Sort(out)
	if len(out) == 0 {
		return "-", nil
	}
	return strings.Join(out, ","), nil
}
