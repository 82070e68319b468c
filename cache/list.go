package cache

import (
	"context"
	"iter"

	"github.com/lamina-build/lamina/metadata"
)

// Records yields all records as they are at one moment, in the order of their
// ids, where a reopened one has the place of its first id. It takes no handle and changes no counter; mutables that are in memory only are not
// among them. A record that cannot be read comes as nil with a
// *metadata.DamagedError, and the walk goes on; any other error ends it. The
// loop's body must change nothing in the cache, which might wait for the walk.
func (m *Manager) Records(ctx context.Context) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		end, err := m.begin()
		if err != nil {
			yield(nil, err)
			return
		}
		defer end()
		stopped := false
		err = m.store.View(ctx, func(tx *metadata.Tx) error {
			for rec, err := range tx.Records() {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if stopped = !yield(rec, err); stopped {
					return nil
				}
			}
			return nil
		})
		if err != nil && !stopped {
			yield(nil, err)
		}
	}
}

// Attachments lists the names of what is attached to a record, sorted. A
// record that does not exist has none.
func (m *Manager) Attachments(ctx context.Context, id ID) (names []string, err error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for name := range tx.Attachments(id) {
			names = append(names, name)
		}
		return nil
	})
	return names, err
}

// Totals are the sums over all records by type, state and sharing. They are
// read, not computed: it costs the same whatever the number of records.
func (m *Manager) Totals(ctx context.Context) (totals []metadata.Total, err error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		totals, err = tx.Totals()
		return err
	})
	return totals, err
}
