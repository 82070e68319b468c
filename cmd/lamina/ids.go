package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace"
)

// keyPrefix begins the form of an ID argument that names a workspace.
const keyPrefix = "key:"

// resolve finds the record that an ID argument means.
func resolve(ctx context.Context, m *cache.Manager, arg string) (cache.ID, error) {
	id, err := find(ctx, m, arg)
	return id, about(cache.ID(arg), err)
}

func find(ctx context.Context, m *cache.Manager, arg string) (cache.ID, error) {
	if arg == "" {
		return "", fmt.Errorf("an id is empty: %w", errdefs.ErrInvalidArgument)
	}
	key, isKey := strings.CutPrefix(arg, keyPrefix)
	if !isKey {
		id, err := m.Resolve(ctx, arg)
		if errdefs.IsNotFound(err) {
			err = hintf(err, "lamina ls lists what there is")
		}
		return id, err
	}
	id, err := workspace.Find(ctx, m, key)
	if errdefs.IsNotFound(err) {
		err = hintf(fmt.Errorf("no workspace has the key %q: %w", clip(key), errdefs.ErrNotFound), "lamina ls lists what there is")
	}
	return id, err
}

// keyOf is the key of the workspace that a record is, empty if it is none.
func keyOf(rec *cache.Record) string {
	for _, v := range rec.Values {
		if v.Name == workspace.ValueKey {
			return string(v.Data)
		}
	}
	return ""
}

// clip keeps messages short when somebody passes kilobytes.
func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
