package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Settle implements Driver. It reads the directories new, active and trash,
// and the infos of active entries with a parent, but not the committed ones;
// as long as there are adopted snapshots without an entry, also where each
// entry's data is.
// It may run beside other calls: what these are working on is left alone.
func (t *tree) Settle(ctx context.Context) error {
	for _, part := range []func(context.Context) error{t.settleNew, t.settleAdopted, t.settleTrash, t.settleActive} {
		if err := part(ctx); err != nil {
			return fmt.Errorf("settle: %w", err)
		}
	}
	return nil
}

// settleNew drops what was being made.
func (t *tree) settleNew(ctx context.Context) error {
	names, err := t.list(dirNew)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if t.marked(&t.making, name) {
			continue
		}
		at := t.path(dirNew, name)
		if err := t.leave("settle.leave", at); err != nil {
			return err
		}
		if err := t.step("settle.new"); err != nil {
			return err
		}
		if strings.HasPrefix(name, trialPrefix) {
			// A trial that was killed may have left its mount.
			if err := unix.Unmount(below(at, "m"), unix.MNT_DETACH); err != nil &&
				!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPERM) {
				return &os.PathError{Op: "unmount", Path: below(at, "m"), Err: err}
			}
		}
		if err := removeTree(at); err != nil {
			return err
		}
	}
	return nil
}

// settleTrash finishes the second half of removals. An entry without children
// stops being a child itself, which may free its parent, and so on until
// nothing changes. What still has children then was about to be refused: it
// goes back. The others stay; Pending lists them.
func (t *tree) settleTrash(ctx context.Context) error {
	names, err := t.list(dirTrash)
	if err != nil {
		return err
	}
	var parents []entry
	for changed := true; changed; {
		changed, parents = false, nil
		for _, name := range names {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			e := entry{dirTrash, name}
			if _, ok := splitTrash(name); !ok || t.marked(&t.held, name) {
				continue
			}
			if moved(name) {
				continue // it has no children, and is none
			}
			n, err := children(t.at(e))
			if err != nil {
				return err
			}
			if n > 0 {
				parents = append(parents, e)
				continue
			}
			has, err := exists(below(t.at(e), "parent"))
			if err != nil {
				return err
			}
			if !has {
				continue
			}
			if err := t.leave("settle.leave", t.at(e)); err != nil {
				return err
			}
			changed = true
		}
	}
	var errs []error
	for _, e := range parents {
		from, _ := splitTrash(e.name)
		errs = append(errs, t.rename("settle.back", e, from))
	}
	t.mu.Lock()
	t.layers, t.gen = map[string]layer{}, t.gen+1
	t.mu.Unlock()
	return errors.Join(errs...)
}

// settleActive takes back a commit that was cut between the link to the
// parent that it was to get and the rename. An entry that only its info can
// name goes to trash when that is lost: nothing could mount it, or tell it
// from others.
func (t *tree) settleActive(ctx context.Context) error {
	names, err := t.list(dirActive)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		e := entry{dirActive, name}
		has, err := exists(below(t.at(e), "parent"))
		if err != nil {
			return err
		}
		if !entryName(name) || (!has && !hashed(name)) {
			continue
		}
		if err := t.settleOne(e, has); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) settleOne(e entry, isChild bool) error {
	s, err := t.stateOf(e)
	lost := errdefs.IsDataLoss(err) || errors.Is(err, fs.ErrNotExist)
	switch {
	case lost && hashed(e.name):
		if err := t.leave("settle.leave", t.at(e)); err != nil {
			return err
		}
		return t.rename("settle.lost", e, entry{dirTrash, trashName(e)})
	case lost:
		return nil // its key is known: the caller decides
	case err != nil:
		return err
	}
	key, ok := decodeKey(e.name)
	if !ok {
		key = string(s.Key)
	}
	defer t.lock(key)()
	// Again, now that no commit can be under way.
	s, err = t.stateOf(e)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || s.Parent != "" || !isChild {
		return err
	}
	return t.leave("settle.rebase", t.at(e))
}

// Pending implements Driver.
func (t *tree) Pending(ctx context.Context) ([]Pending, error) {
	var out []Pending
	names, err := t.list(dirActive)
	if err != nil {
		return nil, fmt.Errorf("pending: %w", err)
	}
	for _, name := range names {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		key, ok := t.keyOf(entry{dirActive, name}, false)
		if ok {
			out = append(out, Pending{Key: key, Kind: PendingActive, entry: path.Join(dirActive, name)})
		}
	}
	adopted, err := t.allAwaited(dirActive, names)
	if err != nil {
		return nil, fmt.Errorf("pending: %w", err)
	}
	for _, a := range adopted {
		if key, ok := a.fullKey(); ok {
			out = append(out, Pending{Key: key, Kind: PendingActive, entry: path.Join(dirActive, a.name)})
		}
	}
	names, err = t.list(dirTrash)
	if err != nil {
		return nil, fmt.Errorf("pending: %w", err)
	}
	for _, name := range names {
		from, ok := splitTrash(name)
		if !ok {
			continue
		}
		// A key that is lost with a half deleted info is left empty; the
		// entry is still known.
		key, _ := t.keyOf(entry{dirTrash, name}, from.dir == dirCommitted)
		out = append(out, Pending{Key: key, Kind: PendingRemoval, entry: path.Join(dirTrash, name)})
	}
	return out, nil
}

// Committed implements Driver.
func (t *tree) Committed(ctx context.Context) (keys []string, err error) {
	names, err := t.list(dirCommitted)
	if err != nil {
		return nil, fmt.Errorf("committed: %w", err)
	}
	for _, name := range names {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		if key, ok := t.keyOf(entry{dirCommitted, name}, true); ok {
			keys = append(keys, key)
		}
	}
	adopted, err := t.allAwaited(dirCommitted, names)
	if err != nil {
		return nil, fmt.Errorf("committed: %w", err)
	}
	for _, a := range adopted {
		if key, ok := a.fullKey(); ok {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// keyOf is the key of an entry, from its name or else from its info.
func (t *tree) keyOf(e entry, sealed bool) (string, bool) {
	name := e.name
	if e.dir == dirTrash {
		from, _ := splitTrash(e.name)
		name = from.name
	}
	if key, ok := decodeKey(name); ok {
		return key, true
	}
	if !hashed(name) {
		return "", false
	}
	s, err := readState(below(t.at(e), "info"), sealed)
	return string(s.Key), err == nil && encodeKey(string(s.Key)) == name
}
