// Package legacytest has what tests of migrations need: the archives of real
// state directories with what is known of them, a builder of directories that
// no daemon would leave, and the listing by which trees are compared.
package legacytest

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// Expect is what is known of an archive: what BuildKit itself made of the
// directory, with each pair folded into one.
type Expect struct {
	Name         string             `json:"name"`
	BuildKit     string             `json:"buildkit"`
	Driver       string             `json:"driver"`
	Rows         int                `json:"rows"`
	Records      map[string]*Record `json:"records"`
	Folds        []Fold             `json:"folds"`
	Gone         map[string]string  `json:"gone"`
	StraySnaps   []string           `json:"straySnapshots"`
	InspectedBy  string             `json:"inspectedBy"`
	Crash        []string           `json:"crash"`
	DatabaseName string             `json:"database"`
}

// Fold is a pair.
type Fold struct {
	Mutable   string `json:"mutable"`
	Immutable string `json:"immutable"`
}

// Record is what must survive of one record.
type Record struct {
	Kind               string            `json:"kind"`
	Op                 string            `json:"op"`
	Parent             string            `json:"parent"`
	MergeParents       []string          `json:"mergeParents"`
	DiffLower          string            `json:"diffLower"`
	DiffUpper          string            `json:"diffUpper"`
	RecordType         string            `json:"recordType"`
	Description        string            `json:"description"`
	Retain             bool              `json:"retain"`
	UsageCount         uint64            `json:"usageCount"`
	LastUsedAt         int64             `json:"lastUsedAt"`
	CreatedAt          int64             `json:"createdAt"`
	ImageRefs          []string          `json:"imageRefs"`
	Size               *int64            `json:"size"`
	Snapshot           string            `json:"snapshot"`
	SnapshotKind       string            `json:"snapshotKind"`
	DriverName         string            `json:"driverName"`
	FoldedMutable      string            `json:"foldedMutable"`
	MayDrop            bool              `json:"mayDrop"`
	SharesSnapshotWith []string          `json:"sharesSnapshotWith"`
	Indexes            []string          `json:"indexes"`
	OptionalIndexes    []string          `json:"optionalIndexes"`
	Values             map[string]string `json:"values"`
	Externals          map[string]string `json:"externals"`
	Blob               *Blob             `json:"blob"`
	Tree               string            `json:"tree"`
	TreeEntries        int               `json:"treeEntries"`
	ContentHash        map[string]string `json:"contenthash"`
	ContentHashNow     map[string]string `json:"contenthashNow"`
}

// Blob is the layer of a record.
type Blob struct {
	Digest      string `json:"digest"`
	DiffID      string `json:"diffID"`
	ChainID     string `json:"chainID"`
	BlobChainID string `json:"blobChainID"`
	MediaType   string `json:"mediaType"`
	Size        int64  `json:"size"`
}

// Names lists the archives in dir.
func Names(dir string) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.tar.zst"))
	names := make([]string, 0, len(paths))
	for _, p := range paths {
		names = append(names, strings.TrimSuffix(filepath.Base(p), ".tar.zst"))
	}
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("no archives in %s", dir)
	}
	return names, err
}

// Load reads what is known of an archive.
func Load(dir, name string) (*Expect, error) {
	b, err := os.ReadFile(filepath.Join(dir, name+".expect.json"))
	if err != nil {
		return nil, err
	}
	var e Expect
	return &e, json.Unmarshal(b, &e)
}

// Unpack makes the archive's tree below to, with owners, devices and
// attributes, for which it needs root.
func Unpack(dir, name, to string) error {
	f, err := os.Open(filepath.Join(dir, name+".tar.zst"))
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		return err
	}
	defer z.Close()
	var dirs []*tar.Header
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = unpackOne(r, h, to)
		}
		if err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := os.Chtimes(filepath.Join(to, dirs[i].Name), dirs[i].ModTime, dirs[i].ModTime); err != nil {
			return err
		}
	}
	return nil
}

func unpackOne(r io.Reader, h *tar.Header, to string) error {
	path := filepath.Join(to, h.Name)
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		if err = os.Mkdir(path, 0o700); errors.Is(err, os.ErrExist) {
			err = nil
		}
	case tar.TypeReg:
		err = unpackFile(r, path)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, path)
	case tar.TypeLink:
		return os.Link(filepath.Join(to, h.Linkname), path)
	case tar.TypeChar:
		err = unix.Mknod(path, unix.S_IFCHR, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	case tar.TypeBlock:
		err = unix.Mknod(path, unix.S_IFBLK, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	case tar.TypeFifo:
		err = unix.Mknod(path, unix.S_IFIFO, 0)
	default:
		err = fmt.Errorf("entry of type %q", h.Typeflag)
	}
	if err != nil {
		return err
	}
	if err := os.Lchown(path, h.Uid, h.Gid); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(path, uint32(h.Mode)&0o7777); err != nil {
			return err
		}
	}
	for name, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(name, "SCHILY.xattr."); ok {
			if err := unix.Lsetxattr(path, attr, []byte(value), 0); err != nil {
				return fmt.Errorf("%s of %s: %w", attr, path, err)
			}
		}
	}
	// Of links, too: a comparison of two trees goes by times.
	at, err := unix.TimeToTimespec(h.ModTime)
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
}

func unpackFile(r io.Reader, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
