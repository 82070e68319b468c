package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// marks keeps the file that says whether names need settling: clean, if the
// driver's names and the records agree, or dirty. It speaks of names only, and
// of this boot, so it is never synced.
type marks struct {
	root string
	step func(string) error

	// mu is a leaf: it is held across one rename, once per open store.
	mu    sync.Mutex
	dirty bool
}

func (k *marks) path(name string) string { return filepath.Join(k.root, name) }

// clean reports whether the last one who changed names put everything right.
func (k *marks) clean() bool {
	_, clean := os.Lstat(k.path("clean"))
	_, dirty := os.Lstat(k.path("dirty"))
	return clean == nil && errors.Is(dirty, fs.ErrNotExist)
}

// setDirty is called before the first driver call that changes names.
func (k *marks) setDirty() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dirty {
		return nil
	}
	if err := k.step("mark dirty"); err != nil {
		return fmt.Errorf("mark the store dirty: %w", err)
	}
	err := os.Rename(k.path("clean"), k.path("dirty"))
	if errors.Is(err, fs.ErrNotExist) {
		var f *os.File
		if f, err = os.OpenFile(k.path("dirty"), os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("mark the store dirty: %w", classify(err))
	}
	k.dirty = true
	return nil
}

// setClean ends what setDirty began; a store that nobody changed is left as it
// is.
func (k *marks) setClean() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.dirty {
		return nil
	}
	if err := k.step("mark clean"); err != nil {
		return fmt.Errorf("mark the store clean: %w", err)
	}
	if err := os.Rename(k.path("dirty"), k.path("clean")); err != nil {
		return fmt.Errorf("mark the store clean: %w", err)
	}
	k.dirty = false
	return nil
}
