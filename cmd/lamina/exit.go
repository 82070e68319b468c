package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/workspace/sandbox"
)

// Exit codes of lamina itself. run and exec pass their command's code on.
const (
	exitOK      = 0
	exitError   = 1
	exitUsage   = 2
	exitPartly  = 3
	exitDamage  = 5
	exitNoStore = 10
	exitLocked  = 11
	exitNewer   = 12
)

// usageError is a command line that cannot be understood.
type usageError struct {
	err  error
	path string // the command whose help tells more
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() []error {
	return []error{e.err, errdefs.ErrInvalidArgument}
}

func usage(cmd *cobra.Command, err error) error {
	return &usageError{err: err, path: cmd.CommandPath()}
}

func usagef(cmd *cobra.Command, format string, args ...any) error {
	return usage(cmd, fmt.Errorf(format, args...))
}

// statusError ends the program with a code when all has been said, e.g. the
// code of the command that exec ran.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// noStoreError says that there is no store, or none yet.
type noStoreError struct {
	root   string
	legacy bool
}

func (e *noStoreError) Error() string {
	if e.legacy {
		return fmt.Sprintf("no store in %s, but the state of a BuildKit worker: import it with lamina migrate", e.root)
	}
	return fmt.Sprintf("no store in %s: lamina run, new and import make one there; --root or LAMINA_ROOT names another place", e.root)
}

func (e *noStoreError) Unwrap() error { return errdefs.ErrNotFound }

// idError says which record an error is about, as the caller named it.
type idError struct {
	id  cache.ID
	err error
}

func (e *idError) Error() string { return e.err.Error() }
func (e *idError) Unwrap() error { return e.err }

// about names the record that err, which may be nil, is about.
func about(id cache.ID, err error) error {
	if err == nil {
		return nil
	}
	return &idError{id: id, err: err}
}

// hintError adds what to do next.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() + "; " + e.hint }
func (e *hintError) Unwrap() error { return e.err }

func hintf(err error, format string, args ...any) error {
	return &hintError{err: err, hint: fmt.Sprintf(format, args...)}
}

// report tells how a command ended and gives the exit code.
func (a *app) report(cmd *cobra.Command, err error) int {
	if err == nil {
		return exitOK
	}
	var status statusError
	if errors.As(err, &status) {
		return int(status)
	}
	err = a.hintRoom(err)
	a.complain(cmd, err)
	return exitCode(err)
}

// hintRoom says what helps where the disk of the store is full. Other files, as
// what is exported, are not its business.
func (a *app) hintRoom(err error) error {
	var at *fs.PathError
	root, rerr := a.root()
	if rerr != nil || !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) ||
		!errors.As(err, &at) || !strings.HasPrefix(at.Path, root+"/") {
		return err
	}
	return hintf(err, "lamina prune makes room there")
}

// complain prints an error on stderr.
func (a *app) complain(cmd *cobra.Command, err error) {
	message := oneLine(err.Error())
	if a.json {
		var e errorView
		e.Error.Class, e.Error.ID, e.Error.Message = classOf(err), string(idOf(err)), message
		// A map of strings cannot fail to be encoded.
		text, _ := json.Marshal(e)
		fmt.Fprintf(a.err, "%s\n", text)
		return
	}
	fmt.Fprintf(a.err, "%s: %s\n", cmd.CommandPath(), safe(message))
	var u *usageError
	if errors.As(err, &u) {
		fmt.Fprintf(a.err, "See '%s --help'.\n", u.path)
	}
}

// errorView is the JSON form of an error.
type errorView struct {
	Error struct {
		Class   string `json:"class"`
		ID      string `json:"id"`
		Message string `json:"message"`
	} `json:"error"`
}

// oneLine joins the lines that errors.Join makes.
func oneLine(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ") }

func exitCode(err error) int {
	var (
		signal  sandbox.SignalError
		usage   *usageError
		noStore *noStoreError
	)
	switch {
	case errors.As(err, &signal):
		return signal.Status()
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &noStore):
		return exitNoStore
	case errors.Is(err, metadata.ErrNewerSchema):
		return exitNewer
	case isLocked(err):
		return exitLocked
	case errors.Is(err, errdefs.ErrDataLoss):
		return exitDamage
	}
	return exitError
}

func isLocked(err error) bool {
	return errors.Is(err, cache.ErrLocked) || errors.Is(err, metadata.ErrLocked)
}

// classOf names the class of an error: an errdefs name in snake case, or
// locked.
func classOf(err error) string {
	var signal sandbox.SignalError
	switch {
	case errors.As(err, &signal):
		return "canceled"
	case isLocked(err):
		return "locked"
	}
	// The outermost class counts, as it does for whoever wrapped the error.
	switch class := errdefs.Resolve(err); {
	case errors.Is(class, context.Canceled):
		return "canceled"
	case errors.Is(class, context.DeadlineExceeded):
		return "deadline_exceeded"
	case !errors.Is(class, errdefs.ErrUnknown):
		return strings.ReplaceAll(class.Error(), " ", "_")
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "not_found"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return "permission_denied"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "resource_exhausted"
	}
	return "unknown"
}

// idOf is the id that an error is about, empty if it is about none.
func idOf(err error) cache.ID {
	var locked *cache.LockedError
	var id *idError
	switch {
	case errors.As(err, &id):
		return id.id
	case errors.As(err, &locked):
		return locked.ID
	}
	return ""
}
