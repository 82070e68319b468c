package metadata

import (
	"crypto/rand"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
)

// ids mints ULIDs that grow, whatever the clock does and however many
// goroutines ask.
type ids struct {
	mu      sync.Mutex
	now     func() time.Time
	last    uint64 // milliseconds of the last id
	entropy *ulid.MonotonicEntropy
}

// newIDs starts behind the greatest time that an id of the store has.
func newIDs(now func() time.Time, greatest uint64) *ids {
	g := &ids{now: now, entropy: ulid.Monotonic(rand.Reader, 0)}
	if greatest > 0 {
		g.last = min(greatest+1, ulid.MaxTime())
	}
	return g
}

func (g *ids) mint() ID {
	g.mu.Lock()
	defer g.mu.Unlock()
	// A clock before 1970 counts as 1970.
	now := uint64(max(g.now().UnixMilli(), 0))
	g.last = min(max(g.last, now), ulid.MaxTime())
	for {
		id, err := ulid.New(g.last, g.entropy)
		if err == nil {
			return ID(id.String())
		}
		// The random part of this millisecond is used up: go on with the
		// next one, or, at the end of time, with another random part.
		if g.last < ulid.MaxTime() {
			g.last++
		} else {
			g.entropy = ulid.Monotonic(rand.Reader, 0)
		}
	}
}

// NewID mints an id: a ULID that is greater than all that this store minted
// and, unless that one is at the end of time, than the greatest ULID in it.
// No clock that steps back makes it repeat one.
func (s *Store) NewID() ID { return s.ids.mint() }

// ulidTime returns the milliseconds of an id that is a ULID in its one proper
// spelling.
func ulidTime(id ID) (uint64, bool) {
	u, err := ulid.ParseStrict(string(id))
	if err != nil || u.String() != string(id) {
		return 0, false
	}
	return u.Time(), true
}

// noteID keeps the greatest time of an id in the header of the bucket record,
// so that Open finds it without looking for it: imported ids sort among and
// behind the minted ones.
func (tx *Tx) noteID(id ID) error {
	ms, ok := ulidTime(id)
	if !ok {
		return nil
	}
	have, err := tx.sequence(bucketRecord)
	if err != nil || ms <= have {
		return err
	}
	return tx.setSequence(bucketRecord, ms)
}
