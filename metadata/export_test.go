package metadata

import "os"

// Waiting is the number of updates that no leader has taken.
func Waiting(s *Store) int {
	s.queue.mu.Lock()
	defer s.queue.mu.Unlock()
	return len(s.queue.waiting)
}

// Frame wraps a payload as the store does.
func Frame(key, payload []byte) []byte { return frame(key, payload) }

// MetaPage says where the pages are that an Open needs.
type MetaPage struct{ Root, Freelist, Used uint64 }

// NewestMeta reads the meta page that counts.
func NewestMeta(path string) (MetaPage, error) {
	f, err := os.Open(path)
	if err != nil {
		return MetaPage{}, err
	}
	defer f.Close()
	m, err := newestMeta(f)
	return MetaPage{m.root, m.freelist, m.used}, err
}

// UnderRace says whether the race detector slows everything down.
const UnderRace = stride > 1
