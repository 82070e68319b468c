package contenthash

import "time"

// SetPageTarget makes the pages of a tree smaller than usual.
func (t *Tree) SetPageTarget(size int) { t.pageTarget = size }

// SetClock sets the clock that tells which stat data are too young.
func (t *Tree) SetClock(now func() time.Time) { t.now = func() int64 { return now().UnixNano() } }
