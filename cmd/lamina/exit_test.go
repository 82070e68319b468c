package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/workspace/sandbox"
)

func TestExitCodesAndClasses(t *testing.T) {
	verb := &cobra.Command{Use: "verb"}
	stopped := fmt.Errorf("wait: %w", sandbox.SignalError{Signal: syscall.SIGTERM})
	for _, c := range []struct {
		name  string
		err   error
		code  int
		class string
	}{
		{"plain", errors.New("oops"), 1, "unknown"},
		{"usage", usagef(verb, "no such flag"), 2, "invalid_argument"},
		{"invalid", fmt.Errorf("id: %w", errdefs.ErrInvalidArgument), 1, "invalid_argument"},
		{"not found", fmt.Errorf("record: %w", errdefs.ErrNotFound), 1, "not_found"},
		{"errno", &os.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, 1, "not_found"},
		{"permission", &os.PathError{Op: "open", Path: "x", Err: fs.ErrPermission}, 1, "permission_denied"},
		{"read-only", &os.PathError{Op: "mkdir", Path: "x", Err: syscall.EROFS}, 1, "permission_denied"},
		{"full", fmt.Errorf("write: %w", syscall.ENOSPC), 1, "resource_exhausted"},
		{"outermost class", fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, errdefs.ErrNotFound), 1, "failed_precondition"},
		{"not yet", errdefs.ErrNotImplemented, 1, "not_implemented"},
		{"no store", &noStoreError{root: "/x"}, 10, "not_found"},
		{"no store, explained", fmt.Errorf("root is a file: %w", &noStoreError{root: "/x"}), 10, "not_found"},
		{"record locked", &cache.LockedError{ID: "x"}, 11, "locked"},
		{"store locked", hintf(&metadata.LockedError{Path: "x"}, "wait"), 11, "locked"},
		{"newer", fmt.Errorf("open: %w", metadata.ErrNewerSchema), 12, "failed_precondition"},
		{"damaged", &metadata.DamagedError{Bucket: "record"}, 5, "data_loss"},
		{"terminated", stopped, 143, "canceled"},
		{"interrupted while locked", errors.Join(sandbox.SignalError{Signal: syscall.SIGINT}, &cache.LockedError{ID: "x"}), 130, "canceled"},
		{"cancelled", context.Canceled, 1, "canceled"},
		{"deadline", context.DeadlineExceeded, 1, "deadline_exceeded"},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.Equal(t, c.code, exitCode(c.err))
			require.Equal(t, c.class, classOf(c.err))
		})
	}
}

func TestReport(t *testing.T) {
	var stderr bytes.Buffer
	a := &app{err: &stderr}
	root := &cobra.Command{Use: "lamina"}
	verb := &cobra.Command{Use: "verb"}
	root.AddCommand(verb)

	require.Equal(t, 0, a.report(verb, nil))
	require.Equal(t, 7, a.report(verb, fmt.Errorf("said: %w", statusError(7))))
	require.Empty(t, stderr.String(), "what was said is said again")

	locked := &cache.LockedError{ID: "abc", Holders: []cache.Holder{{Kind: cache.HolderProcess, PID: 42, Command: "lamina run"}}}
	require.Equal(t, 11, a.report(verb, errors.Join(locked, errors.New("second\x1b[31m line"))))
	require.Equal(t, "lamina verb: record abc is held by process 42 (lamina run); second\\x1b[31m line\n", stderr.String())

	stderr.Reset()
	require.Equal(t, 2, a.report(verb, usagef(verb, "what?")))
	require.Equal(t, "lamina verb: what?\nSee 'lamina verb --help'.\n", stderr.String())

	stderr.Reset()
	a.json = true
	require.Equal(t, 1, a.report(verb, about("key:\"x\"", fmt.Errorf("gone: %w", errdefs.ErrNotFound))))
	var v map[string]map[string]string
	require.NoError(t, json.Unmarshal(stderr.Bytes(), &v))
	require.Equal(t, map[string]map[string]string{"error": {"class": "not_found", "id": "key:\"x\"", "message": "gone: not found"}}, v)

	stderr.Reset()
	a.report(verb, fmt.Errorf("rm: %w", locked))
	require.NoError(t, json.Unmarshal(stderr.Bytes(), &v))
	require.Equal(t, "abc", v["error"]["id"], "the id of the record that is locked")
	require.Equal(t, "locked", v["error"]["class"])
}

// TestEndedBySignal: the exit code is that of the signal, also where a library
// only says that the context ended.
func TestEndedBySignal(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	canceled := fmt.Errorf("hash record x: %w", context.Canceled)
	require.Equal(t, canceled, bySignal(ctx, canceled), "somebody else's context")
	cancel(sandbox.SignalError{Signal: syscall.SIGTERM})
	for _, err := range []error{canceled, context.Cause(ctx), fmt.Errorf("wait: %w", context.Cause(ctx))} {
		require.Equal(t, 143, exitCode(bySignal(ctx, err)), "%v", err)
		require.Equal(t, "canceled", classOf(bySignal(ctx, err)))
	}
	require.NoError(t, bySignal(ctx, nil))
	other := errors.New("oops")
	require.Equal(t, other, bySignal(ctx, other))
}

// TestHintOfRoom: only a full disk of the store is one that a prune helps.
func TestHintOfRoom(t *testing.T) {
	a := &app{rootDir: "/srv/store"}
	for path, hint := range map[string]bool{"/srv/store/snapshots/new/x": true, "/srv/storehouse/x": false, "out.tar": false} {
		err := fmt.Errorf("prepare: %w", &os.PathError{Op: "mkdir", Path: path, Err: syscall.ENOSPC})
		require.Equal(t, hint, strings.Contains(a.hintRoom(err).Error(), "lamina prune"), path)
		require.ErrorIs(t, a.hintRoom(err), syscall.ENOSPC)
	}
	other := &os.PathError{Op: "mkdir", Path: "/srv/store/x", Err: syscall.EIO}
	require.Equal(t, error(other), a.hintRoom(other))
}
