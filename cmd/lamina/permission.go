package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// In its user namespace lamina may override the permissions of the user's
// files: overlayfs needs that for its work directories. It must not do so for
// what a person has protected, so these are asked for as the user who called:
// access(2) takes no account of capabilities.

// mayUse refuses a root that the user may not write to.
func (a *app) mayUse(root string) error {
	if a.namespace == nil || !a.namespace.User {
		return nil
	}
	// The store itself, or where it would be made.
	for dir := root; ; dir = filepath.Dir(dir) {
		err := unix.Access(dir, unix.W_OK|unix.X_OK)
		if errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir) {
			continue
		}
		return denied(dir, err)
	}
}

// mayMake refuses a file that the user may not make.
func (a *app) mayMake(path string) error {
	if a.namespace == nil || !a.namespace.User {
		return nil
	}
	dir := filepath.Dir(path)
	return denied(dir, unix.Access(dir, unix.W_OK|unix.X_OK))
}

// mayRead refuses a directory that the user may not read.
func (a *app) mayRead(dir string) error {
	if a.namespace == nil || !a.namespace.User {
		return nil
	}
	return denied(dir, unix.Access(dir, unix.R_OK|unix.X_OK))
}

// denied keeps only the refusal of a directory: any other error, and what is no
// directory, will be met again by whoever can say it better.
func denied(path string, err error) error {
	if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EROFS) {
		return nil
	}
	if st, serr := os.Stat(path); serr == nil && !st.IsDir() {
		return nil
	}
	return fmt.Errorf("%w: %w", &os.PathError{Op: "access", Path: path, Err: err}, errdefs.ErrPermissionDenied)
}
