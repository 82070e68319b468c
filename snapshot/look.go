package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
)

// Stat implements snapshots.Snapshotter.
func (t *tree) Stat(_ context.Context, key string) (snapshots.Info, error) {
	e, s, err := t.look(key)
	if err != nil {
		return snapshots.Info{}, fmt.Errorf("stat: %w", err)
	}
	return s.info(key, e.kind(s)), nil
}

// Update implements snapshots.Snapshotter. Labels are all that can change.
func (t *tree) Update(_ context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	updated, err := t.update(info, fieldpaths)
	if err != nil {
		return snapshots.Info{}, fmt.Errorf("update %q: %w", info.Name, err)
	}
	return updated, nil
}

func (t *tree) update(info snapshots.Info, fieldpaths []string) (snapshots.Info, error) {
	if err := requireKey(info.Name); err != nil {
		return snapshots.Info{}, err
	}
	defer t.lock(info.Name)()
	e, s, err := t.load(info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	labels := s.labels()
	if len(fieldpaths) == 0 {
		labels = info.Labels
	}
	for _, path := range fieldpaths {
		name, one := strings.CutPrefix(path, "labels.")
		switch {
		case one:
			if labels == nil {
				labels = map[string]string{}
			}
			labels[name] = info.Labels[name]
		case path == "labels":
			labels = make(map[string]string, len(info.Labels))
			for k, v := range info.Labels {
				labels[k] = v
			}
		default:
			return snapshots.Info{}, fmt.Errorf("field %q cannot change: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	s.setLabels(labels)
	s.Updated = t.clock().UnixNano()
	if err := t.step("update.info"); err != nil {
		return snapshots.Info{}, err
	}
	if err := appendState(below(t.at(e), "info"), s); err != nil {
		return snapshots.Info{}, err
	}
	return s.info(info.Name, e.kind(s)), nil
}

// Usage implements snapshots.Snapshotter. It is measured for active snapshots
// and exact layers, known for other committed ones, and zero for views.
func (t *tree) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	e, s, err := t.look(key)
	if err == nil && e.kind(s) == snapshots.KindActive {
		e, s, err = t.load(key) // to be measured it must be there
	}
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage: %w", err)
	}
	switch {
	case e.kind(s) == snapshots.KindView:
		return snapshots.Usage{}, nil
	case s.Usage != nil:
		return snapshots.Usage{Inodes: s.Usage.Inodes, Size: s.Usage.Size}, nil
	}
	used, err := measure(ctx, below(t.at(e), "fs"))
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of %q: %w", key, asNotFound(err))
	}
	return used, nil
}

// Mounts implements snapshots.Snapshotter.
func (t *tree) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	e, s, err := t.load(key)
	if err == nil && e.dir == dirCommitted {
		err = fmt.Errorf("%q is committed: %w", key, errdefs.ErrFailedPrecondition)
	}
	var m []mount.Mount
	if err == nil {
		t.dirty(e.name)
		m, err = t.backend.mounts(e, s, t.at(e))
	}
	if err != nil {
		return nil, fmt.Errorf("mounts: %w", err)
	}
	return m, nil
}

// Walk implements snapshots.Snapshotter, in the order of the directory
// names, active ones first, adopted ones without an entry behind the others. Names that come or go meanwhile may be left out;
// one that stays is not. An entry whose info is damaged does not hide the
// others: it is reported at the end.
func (t *tree) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return fmt.Errorf("walk: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	// Active names are read first: one that is committed between the two is
	// then seen under its new name.
	type seen struct {
		entry
		awaited *adoption
	}
	var entries []seen
	for _, dir := range []string{dirActive, dirCommitted} {
		names, err := t.list(dir)
		if err != nil {
			return fmt.Errorf("walk: %w", err)
		}
		for _, name := range names {
			entries = append(entries, seen{entry: entry{dir, name}})
		}
		adopted, err := t.allAwaited(dir, names)
		if err != nil {
			return fmt.Errorf("walk: %w", err)
		}
		for _, a := range adopted {
			entries = append(entries, seen{a.entry(), &a})
		}
	}
	var damaged []error
	for _, e := range entries {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		info, ok, err := t.visit(e.entry, e.awaited)
		if err != nil {
			damaged = append(damaged, fmt.Errorf("walk: %w", err))
		}
		if !ok || !filter.Match(adaptInfo(info)) {
			continue
		}
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return errors.Join(damaged...)
}

// visit describes what Walk saw, an adopted snapshot by its line unless it got
// an entry meanwhile.
func (t *tree) visit(e entry, awaited *adoption) (info snapshots.Info, ok bool, err error) {
	if !entryName(e.name) {
		return snapshots.Info{}, false, nil
	}
	s, err := t.stateOf(e)
	if errors.Is(err, fs.ErrNotExist) && awaited != nil {
		s, err = awaited.state(), nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		if there, thereErr := exists(t.at(e)); there || thereErr != nil {
			err = fmt.Errorf("%s/%s has no info: %w", e.dir, e.name, errors.Join(errdefs.ErrDataLoss, thereErr))
			return snapshots.Info{}, false, err
		}
		return snapshots.Info{}, false, nil
	}
	if err != nil {
		return snapshots.Info{}, false, err
	}
	key, ok := decodeKey(e.name)
	if !ok {
		key = string(s.Key)
	}
	return s.info(key, e.kind(s)), true, nil
}

// adaptInfo shows an Info to filters, as containerd's own store does.
func adaptInfo(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), info.Kind != snapshots.KindUnknown
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			v, ok := info.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}

// Mount implements Driver.
func (t *tree) Mount(ctx context.Context, key, target string, readOnly bool) error {
	err := context.Cause(ctx)
	if err == nil {
		err = requireKey(key)
	}
	if err == nil {
		// The lock keeps a commit's rename and other probes away until the
		// mount is there.
		defer t.lock(key)()
		var e entry
		var s state
		if e, s, err = t.load(key); err == nil {
			readOnly = readOnly || e.kind(s) != snapshots.KindActive
			if !readOnly {
				t.dirty(e.name)
			}
			err = t.backend.mount(e, s, target, readOnly)
		}
	}
	if err != nil {
		return fmt.Errorf("mount %q: %w", key, err)
	}
	return nil
}

// Dir implements Driver.
func (t *tree) Dir(_ context.Context, key string) (string, bool, error) {
	e, s, err := t.load(key)
	if err != nil {
		return "", false, fmt.Errorf("dir: %w", err)
	}
	dir, ok := t.backend.whole(e, s)
	return dir, ok, nil
}

// InUse implements Driver.
func (t *tree) InUse(ctx context.Context, key string) (bool, error) {
	if err := errors.Join(requireKey(key), context.Cause(ctx)); err != nil {
		return false, fmt.Errorf("in use: %w", err)
	}
	defer t.lock(key)()
	e, s, err := t.load(key)
	if err != nil {
		return false, fmt.Errorf("in use: %w", err)
	}
	busy, err := t.backend.inUse(e, s)
	if err != nil {
		return false, fmt.Errorf("in use %q: %w", key, err)
	}
	return busy, nil
}
