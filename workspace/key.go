package workspace

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
)

// Names of the values and attachments of a workspace's record; the log of its
// last run is runlog.Attachment.
const (
	// ValueKey is the value that holds a workspace's key, under Index(key).
	ValueKey = "workspace.key"
	// ValueNext marks a child that a run makes of a finalized workspace, as
	// long as the key has not moved to it.
	ValueNext = "workspace.next"
	// ValueMemo is what the last run depended on, and how it ended.
	ValueMemo = "workspace.memo"
	// AttachmentSource is the source tree that the workspace holds.
	AttachmentSource = "source"
)

// Type is the record type of workspaces.
const Type = "workspace"

// maxKey keeps keys readable in lists and short enough for an index key.
const maxKey = 1024

// Index is the index key that finds the workspace of key.
func Index(key string) string { return "workspace:" + key }

func nextIndex(key string) string { return "workspace.next:" + key }

func checkKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("a workspace needs a key: %w", errdefs.ErrInvalidArgument)
	case len(key) > maxKey:
		return fmt.Errorf("key has %d bytes, more than %d: %w", len(key), maxKey, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Find is the id of the workspace of key, or NotFound.
func Find(ctx context.Context, m *cache.Manager, key string) (cache.ID, error) {
	if err := checkKey(key); err != nil {
		return "", err
	}
	ids, err := m.Search(ctx, Index(key))
	if err != nil {
		return "", err
	}
	if len(ids) == 0 {
		return "", fmt.Errorf("no workspace has the key %q: %w", key, errdefs.ErrNotFound)
	}
	return newest(ids), nil
}

// newest of ids that begin with their time.
func newest(ids []cache.ID) cache.ID { return slices.Max(ids) }

// dirName turns a key, which may hold any bytes, into one path component that
// depends on nothing else.
func dirName(key string) string {
	const most = 100
	ok := len(key) <= most && !strings.HasPrefix(key, ".") && !strings.HasPrefix(key, "key-")
	for i := 0; ok && i < len(key); i++ {
		c := key[i]
		ok = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_.+", c) >= 0
	}
	if ok {
		return key
	}
	sum := sha256.Sum256([]byte(key))
	return "key-" + hex.EncodeToString(sum[:16])
}
