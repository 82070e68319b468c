package source

import "github.com/lamina-build/lamina/internal/fsat"

// settled says that a file which showed the time s at the moment looked shows
// another one after every change made since.
func (s stamp) settled(looked stamp) bool {
	return s.before(stampOf(looked.time().Add(-fsat.Window(int64(s.nsec)))))
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
