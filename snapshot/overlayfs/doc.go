// Package overlayfs is what Lamina knows of the Linux kernel's overlayfs: how
// to mount a stack of directories, how to ask whether a directory is some
// mount's upper layer right now, what a volatile mount leaves behind, and
// which facts a driver may rest on, tried on the file system at hand.
//
// It knows nothing of snapshots, names or caches. All paths are directories
// that the caller made, and every function is safe for concurrent use as long
// as no upper directory is given to two calls at once.
//
// # Options
//
// Every mount has index=off, metacopy=off, redirect_dir=nofollow and xino=off,
// whatever the kernel was built with or told by module parameters: an upper
// directory is then a plain difference that can be stacked over other layers,
// and a directory does not change its meaning when it is mounted on another
// machine. redirect_dir=off would mean "follow" on most kernels. Layers that other
// mounts have made may need [Mount.Follow].
//
// The kernel's own description is
// https://docs.kernel.org/filesystems/overlayfs.html.
package overlayfs
