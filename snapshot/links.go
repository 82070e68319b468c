package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// shortLink is a short path of a directory below an entry, for mount options
// that would be too long otherwise. The link is named by the directory's
// inode number, which no other directory has as long as this one lives; at is
// where it lies now, place where it is to be found. A link that a removed
// directory left behind is replaced.
func (t *tree) shortLink(at string, place entry, elem string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(at, &st); err != nil {
		return "", asNotFound(&os.PathError{Op: "stat", Path: at, Err: err})
	}
	link := t.path(dirLinks, shortName(&st, t.dev))
	target := filepath.Join("..", place.dir, place.name, elem)
	switch got, err := os.Readlink(link); {
	case err == nil && got == target:
		return link, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", err
	}
	if err := t.step("links.make"); err != nil {
		return "", err
	}
	next := randomName(link)
	if err := os.Symlink(target, next); err != nil {
		return "", err
	}
	if err := os.Rename(next, link); err != nil {
		return "", errors.Join(err, os.Remove(next))
	}
	return link, nil
}

// shortName is unique among the directories of the tree. Adopted ones may lie
// on another device, where numbers are given anew. Five characters stand for
// 900 million inodes, so that the names of a full stack leave room in the page
// for the paths of the upper directories.
func shortName(st *unix.Stat_t, dev uint64) string {
	name := shortNumber(st.Ino)
	if st.Dev != dev {
		name += "-" + shortNumber(st.Dev)
	}
	return name
}

func shortNumber(n uint64) string { return new(big.Int).SetUint64(n).Text(62) }

// layerLink is the short link of a committed name's fs.
func (t *tree) layerLink(name string) (string, error) {
	t.mu.Lock()
	l, ok := t.layers[name]
	gen := t.gen
	t.mu.Unlock()
	if ok && l.link != "" {
		return l.link, nil
	}
	e := entry{dirCommitted, encodeKey(name)}
	link, err := t.shortLink(below(t.at(e), "fs"), e, "fs")
	if err != nil {
		return "", fmt.Errorf("layer %q: %w", name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if l, ok := t.layers[name]; ok && t.gen == gen {
		l.link = link
		t.layers[name] = l
	}
	return link, nil
}

// dropLinks removes the short links of the directories below at, which are
// about to be deleted.
func (t *tree) dropLinks(at string) error {
	for _, elem := range []string{"fs", "work"} {
		var st unix.Stat_t
		err := unix.Stat(below(at, elem), &st)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "stat", Path: below(at, elem), Err: err}
		}
		if err := t.dropLink(&st); err != nil {
			return err
		}
	}
	return nil
}

// dropLink removes the short link of a directory, if it has one.
func (t *tree) dropLink(st *unix.Stat_t) error {
	return unlink(unix.AT_FDCWD, t.path(dirLinks, shortName(st, t.dev)), 0)
}
