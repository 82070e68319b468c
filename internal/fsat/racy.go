package fsat

import "time"

// How much older than a moment a file's time must be for a later change to be
// certain to show another time.
const (
	// fineWindow: the kernel stamps files with a clock that steps once per
	// tick, up to 10 ms (HZ=100), some file systems then round down to another
	// 10 ms (exFAT), and a little is left for good measure. Linux 6.13 and
	// later step finer for files that were looked at; nothing here needs it.
	fineWindow = 25 * time.Millisecond
	// coarseWindow is added for times without a fraction of a second, which
	// file systems with steps of one second (ext3, HFS+, NFSv2) and two (FAT)
	// show. One in 1e9 others shows it by chance and is read once more.
	coarseWindow = 2 * time.Second
)

// Window is how much older than a moment a file's time with this fraction of a
// second, in nanoseconds, must be for every change after that moment to show
// another one: what git calls racy.
func Window(nsec int64) time.Duration {
	if nsec == 0 {
		return fineWindow + coarseWindow
	}
	return fineWindow
}
