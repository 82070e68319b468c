//go:build invariants

package cache

// assertLocked panics unless somebody holds mu: the caller's name ends in
// Locked and was called without it.
func (m *Manager) assertLocked() {
	if m.mu.TryLock() {
		m.mu.Unlock()
		panic("cache: manager lock is not held")
	}
}
