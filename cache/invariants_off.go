//go:build !invariants

package cache

// assertLocked checks nothing: build with the tag invariants to turn it on.
func (m *Manager) assertLocked() {}

func (m *Manager) assertCounts(*entry) {}

func (m *Manager) assertEmpty() {}
