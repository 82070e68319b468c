//go:build race

package cache_test

// underRace says whether the race detector slows everything down.
const underRace = true
