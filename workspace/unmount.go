package workspace

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
)

// Unmount ends the mount that a command worked in. What a killed process had
// open goes a moment after the process: for up to a second it is tried again
// while the kernel says EBUSY.
func Unmount(mnt *cache.Mount) error {
	err := mnt.Unmount()
	for pause := time.Millisecond; errors.Is(err, unix.EBUSY) && pause < time.Second; pause *= 2 {
		<-time.After(pause)
		err = mnt.Unmount()
	}
	return err
}
