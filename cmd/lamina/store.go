package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	clog "github.com/containerd/log"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// access is what a verb wants the store for.
type access int

const (
	// looking opens an existing store read-only: nothing is written.
	looking access = iota
	// changing opens an existing store.
	changing
	// making makes a store where there is none.
	making
)

// root is the directory of the store.
func (a *app) root() (string, error) {
	dir := a.rootDir
	if dir == "" {
		dir = os.Getenv("LAMINA_ROOT")
	}
	if dir == "" && os.Geteuid() == 0 {
		dir = "/var/lib/lamina"
	}
	if dir == "" {
		// The base directory specification asks for relative ones to be
		// ignored.
		data := os.Getenv("XDG_DATA_HOME")
		if !filepath.IsAbs(data) {
			home, err := os.UserHomeDir()
			if err != nil {
				return "", fmt.Errorf("where is the store? Neither --root nor LAMINA_ROOT says it, and %w", err)
			}
			data = filepath.Join(home, ".local", "share")
		}
		dir = filepath.Join(data, "lamina")
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("root directory: %w", err)
	}
	return abs, nil
}

// open opens the store. Whoever does closes it as soon as possible, and before
// anything that takes its time.
func (a *app) open(ctx context.Context, how access) (*cache.Manager, error) {
	root, err := a.root()
	if err != nil {
		return nil, err
	}
	o := a.options(root)
	o.NoCreate, o.ReadOnly = how != making, how == looking
	fresh := isMissing(root)
	if how == making || how == changing && !fresh {
		if err := a.mayUse(root); err != nil {
			return nil, err
		}
	}
	m, err := cache.Open(ctx, o)
	if errors.Is(err, cache.ErrLegacy) && how == making {
		if err := a.takeOver(ctx, root); err != nil {
			return nil, err
		}
		fresh = false
		m, err = cache.Open(ctx, o)
	}
	if err != nil {
		return nil, explainOpen(root, how, fresh, err)
	}
	if d := m.Driver(); fresh && d.Name == snapshot.Native && a.driver == "" {
		fmt.Fprintf(a.err, "lamina: new store in %s with driver %s: %s\n", safe(root), d.Name, safe(d.Reason))
	}
	return m, nil
}

// options are those that each opening has in common.
func (a *app) options(root string) cache.Options {
	o := cache.Options{
		Root:        root,
		DriverName:  a.driver,
		LockTimeout: a.wait,
		OnWait:      a.sayWaiting,
		// Close writes the uses; there is no time for a timer.
		FlushInterval: -1,
		// run syncs beside its command what earlier ones left, and
		// "lamina sync" does it at once.
		SyncInterval: -1,
		Unconfirm:    contenthash.UnconfirmStored,
		Command:      commandLine(os.Args),
		Logger:       a.logger(),
	}
	if o.LockTimeout == 0 {
		o.LockTimeout = -1 // not at all
	}
	if a.namespace != nil {
		o.PrivateMounts, o.NoMounts = a.namespace.Private, !a.namespace.Private
	}
	return o
}

// commandLine is what others are told about this process. It is written into
// files, so the values of --env are left out: they may be secrets.
func commandLine(args []string) string {
	out := slices.Clone(args)
	for i := 1; i < len(out) && out[i] != "--"; i++ {
		value, joined := strings.CutPrefix(out[i], "--env=")
		if !joined && out[i-1] != "--env" {
			continue
		}
		if name, _, has := strings.Cut(value, "="); has {
			out[i] = strings.TrimSuffix(out[i], value) + name + "=..."
		}
	}
	return strings.Join(out, " ")
}

func (a *app) sayWaiting(h metadata.Holder) {
	fmt.Fprintf(a.err, "lamina: the store is open in %s; waiting for up to %s\n", safe(h.String()), a.wait)
}

// isMissing says whether there is no store's file below root.
func isMissing(root string) bool {
	_, err := os.Lstat(filepath.Join(root, cache.StoreFile))
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// explainOpen turns the error of an open into one that says what to do.
func explainOpen(root string, how access, missing bool, err error) error {
	switch {
	case errors.Is(err, cache.ErrLegacy):
		return &noStoreError{root: root, legacy: true}
	case missing && how != making:
		if st, serr := os.Stat(root); serr == nil && !st.IsDir() {
			return fmt.Errorf("root %s is a file, not a directory: %w", root, &noStoreError{root: root})
		}
		return &noStoreError{root: root}
	case errors.Is(err, metadata.ErrNewerSchema):
		return hintf(err, "use the lamina that wrote it, or a newer one; nothing was changed")
	case errors.Is(err, metadata.ErrLocked):
		return hintf(err, "try again, or wait longer with --wait")
	}
	return err
}

// useLog sends what libraries log where our own warnings go.
func (a *app) useLog() {
	slog.SetDefault(slog.New(quiet{a.logger().Handler()}))
	clog.UseSlog()
}

// quiet leaves out what a library warns of that is nobody's business: that a
// file system has no fs-verity, which the content store would use if it had.
type quiet struct{ slog.Handler }

// Handle implements slog.Handler.
func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "fsverity") {
		return nil
	}
	return q.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }

// WithGroup implements slog.Handler.
func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.Handler.WithGroup(name)} }

// logger prints warnings on stderr.
func (a *app) logger() *slog.Logger {
	o := &slog.HandlerOptions{
		Level: slog.LevelWarn,
		ReplaceAttr: func(groups []string, at slog.Attr) slog.Attr {
			if at.Key == slog.TimeKey && len(groups) == 0 && !a.json {
				return slog.Attr{}
			}
			return at
		},
	}
	if a.json {
		return slog.New(slog.NewJSONHandler(a.err, o))
	}
	return slog.New(slog.NewTextHandler(a.err, o))
}

// shut closes the store and keeps the first error.
func shut(m *cache.Manager, err *error) {
	if cerr := m.Close(); cerr != nil {
		*err = errors.Join(*err, fmt.Errorf("close the store: %w", cerr))
	}
}
