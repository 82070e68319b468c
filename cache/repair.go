package cache

import (
	"context"
	"path/filepath"

	"github.com/lamina-build/lamina/metadata"
)

// Repair makes the record store of a cache that nobody has open whole again,
// as far as it can be read (see metadata.Repair), and has the next Open settle
// what Check found between records and snapshots. Of o it uses Root,
// LockTimeout, OnWait, Command, Now and Step. Errors: as those of
// metadata.Repair.
func Repair(ctx context.Context, o Options) (metadata.Report, error) {
	o.setDefaults()
	marks := &marks{root: o.Root, step: o.Step}
	// Ahead of everything, for it may be snapshots alone that need settling.
	if err := marks.setDirty(); err != nil {
		return metadata.Report{}, err
	}
	return metadata.Repair(ctx, filepath.Join(o.Root, StoreFile), metadata.Options{
		LockTimeout: o.LockTimeout,
		OnWait:      o.OnWait,
		Command:     o.Command,
		Now:         o.Now,
		Step: func(name string) error {
			if name == "repair rename" {
				// Again, with the store locked: somebody may have closed it
				// in between and found everything in order.
				if err := marks.setDirtyAgain(); err != nil {
					return err
				}
			}
			return o.Step(name)
		},
	})
}

// setDirtyAgain is setDirty for one who has not had the store open.
func (k *marks) setDirtyAgain() error {
	k.mu.Lock()
	k.dirty = false
	k.mu.Unlock()
	return k.setDirty()
}
