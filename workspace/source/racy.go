package source

import "time"

// How much older than a moment a file's time must be for a later change to be
// certain to show another time.
const (
	// fineWindow: the kernel stamps files with a clock that steps once per
	// tick, up to 10 ms (HZ=100), some file systems then round down to another
	// 10 ms (exFAT), and a little is left for good measure. Linux 6.13 and
	// later step finer for files that were looked at; nothing here needs it.
	fineWindow = 25 * time.Millisecond
	// coarseWindow is for times without a fraction of a second, which file
	// systems with steps of one second (ext3, HFS+, NFSv2) and two (FAT) show.
	// One in 1e9 others shows it by chance and is read once more.
	coarseWindow = 2 * time.Second
)

// settled says that a file which showed the time s at the moment looked shows
// another one after every change made since.
func (s stamp) settled(looked stamp) bool {
	window := fineWindow
	if s.nsec == 0 {
		window += coarseWindow
	}
	return s.before(stampOf(looked.time().Add(-window)))
}

// readForSure says that what was read of n in a scan that began at started
// still holds if n shows the same stat data.
func (n *node) readForSure(started stamp) bool {
	return n.mtime.settled(started) && n.ctime.settled(started)
}

// leftForSure says that a copy which still shows the ctime c has not changed
// since the sync that ended at synced. The copy's mtime is the source's and
// says nothing.
func (c *copied) leftForSure(synced stamp) bool {
	return c.set && c.ctime.settled(synced)
}
