package cache

import "github.com/containerd/containerd/v2/core/content"

// HoldPath is where the hold of a record lies.
var HoldPath = holdPath

// TakeHold takes a hold as a process of its own would.
var TakeHold = takeHold

// WithContentSeam has all calls of the cache's own content store go through what
// seam makes of it.
func (o Options) WithContentSeam(seam func(content.Store) content.Store) Options {
	o.contentSeam = seam
	return o
}

// Aside runs a function as the removals of a prune are run, and AsideNice is by
// how much less urgent it is.
var Aside = aside

const AsideNice = asideNice
