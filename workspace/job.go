package workspace

import (
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/cachemount"
	"github.com/lamina-build/lamina/workspace/output"
	"github.com/lamina-build/lamina/workspace/sandbox"
	"github.com/lamina-build/lamina/workspace/source"
)

// Opener opens the store for a moment. It waits for other processes as its
// owner sees fit. With readOnly it only looks, and a store that does not exist
// is NotFound; else it makes one.
type Opener func(ctx context.Context, readOnly bool) (*cache.Manager, error)

// Job is one run.
type Job struct {
	// Root is the directory of the store that Open opens.
	Root string
	Open Opener
	// Key names the workspace: any bytes, 1024 at most.
	Key string
	// Args are the command, looked up in the PATH of Env.
	Args []string
	// Env is the environment of the command, and all of it counts but for the
	// variables of a session (see SessionEnv) and those that IgnoreEnv names,
	// where a name may end in "*".
	Env       []string
	IgnoreEnv []string
	// Source is the directory that is synced in; empty for none. Exclude
	// leaves paths out, as in a .dockerignore file.
	Source  string
	Exclude []string
	// Outputs are copied out of the workspace when the command succeeded.
	Outputs []output.Spec
	Mounts  []sandbox.Mount
	// Caches are directories that outlive the workspace. What they are counts,
	// what is in them does not, and nothing of them is in the workspace or in
	// its outputs. They need Private.
	Caches []cachemount.Spec
	// Labels are set on the record of the workspace when the command runs;
	// an empty value removes one. They do not count.
	Labels map[string]string
	// NoMemo runs the command even if nothing changed.
	NoMemo bool
	// NoWait fails with cache.ErrLocked, instead of waiting, while another
	// run of the same key is under way or has a cache directory.
	NoWait bool

	// Private says that namespaces can be had.
	Private bool
	Stdout  io.Writer
	Stderr  io.Writer
	Signals <-chan os.Signal

	// OnWait hears whom the run waits for; OnCacheWait the same for one of its
	// cache directories; OnStart that the command is about to run, with what is
	// known of the result, such as why; OnCached that it does not; OnNote what
	// of the source could not be kept as it is. Any may be nil.
	OnWait      func(cache.Holder)
	OnCacheWait func(cachemount.Spec, cache.Holder)
	OnStart     func(Result)
	OnCached    func()
	OnNote      func(source.Note)
	Progress    source.Progress
}

// Result is what a run did. Its JSON form is stable.
type Result struct {
	Key string   `json:"key"`
	ID  cache.ID `json:"id"`
	// PreviousID is the id that the workspace had before this run, or that of
	// its parent if Reopened is false. It is empty if nothing changed hands.
	PreviousID cache.ID `json:"previous_id"`
	// Cached says that nothing ran.
	Cached bool `json:"cached"`
	// Reopened says that the run went on in the same snapshot.
	Reopened bool `json:"reopened"`
	// Why lists what differed from the last run: "first", "source" with
	// "source:PATH" for the first few paths that changed, "command",
	// "env:NAME", "mounts", "failed", "interrupted", "output:PATH", "log" or
	// "no-memo".
	Why []string `json:"why"`
	// SourceChanges counts all paths of the source that changed.
	SourceChanges int           `json:"source_changes"`
	Driver        string        `json:"driver"`
	SourceDigest  digest.Digest `json:"source_digest"`
	// Changed and Removed count the entries that the sync touched.
	Changed  int           `json:"changed"`
	Removed  int           `json:"removed"`
	ExitCode int           `json:"exit_code"`
	Duration time.Duration `json:"-"`
}

// SessionEnv lists the variables that name a session or a terminal rather than
// an input of a build. The command sees them, but they do not count. A name
// that ends in "*" stands for all that begin so.
func SessionEnv() []string {
	return []string{
		"_", "OLDPWD", "PWD", "SHLVL", "PS1", "PS2", "PS3", "PS4", "PROMPT*",
		"TERM", "TERM_*", "TERMINFO*", "COLORTERM", "COLUMNS", "LINES", "LS_COLORS", "LESS*", "PAGER",
		"TMUX*", "STY", "WINDOW", "WINDOWID", "VTE_VERSION", "KONSOLE_*", "ITERM_*", "VSCODE_*",
		"DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_SESSION_*", "XDG_RUNTIME_DIR", "XDG_SEAT*", "XDG_VTNR",
		"DBUS_SESSION_BUS_ADDRESS", "DESKTOP_*", "SESSION_MANAGER", "GDMSESSION",
		"SSH_*", "GPG_TTY", "GPG_AGENT_INFO",
		"INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "NOTIFY_SOCKET", "LISTEN_*", "MANAGERPID",
		"HISTFILE", "HISTSIZE", "HISTCONTROL", "WSL_*", "WSLENV",
	}
}

func (j *Job) validate() error {
	if err := checkKey(j.Key); err != nil {
		return err
	}
	if len(j.Args) == 0 || j.Args[0] == "" {
		return fmt.Errorf("no command to run: %w", errdefs.ErrInvalidArgument)
	}
	for _, p := range j.IgnoreEnv {
		if p == "" {
			return fmt.Errorf("an environment variable needs a name: %w", errdefs.ErrInvalidArgument)
		}
	}
	if j.Source != "" {
		st, err := os.Stat(j.Source)
		switch {
		case os.IsNotExist(err):
			return fmt.Errorf("source %s does not exist: %w", j.Source, errdefs.ErrNotFound)
		case os.IsPermission(err):
			return fmt.Errorf("source: %w: %w", err, errdefs.ErrPermissionDenied)
		case err != nil:
			return fmt.Errorf("source: %w", err)
		case !st.IsDir():
			return fmt.Errorf("source %s is not a directory: %w", j.Source, errdefs.ErrInvalidArgument)
		}
	}
	if _, ok := j.Labels[""]; ok {
		return fmt.Errorf("a label needs a name: %w", errdefs.ErrInvalidArgument)
	}
	if err := j.validateCaches(); err != nil {
		return err
	}
	var err error
	if j.Root, err = filepath.Abs(j.Root); err != nil {
		return err
	}
	return nil
}

func (j *Job) validateCaches() (err error) {
	if j.Caches, err = cachemount.Check(j.Caches); err != nil {
		return err
	}
	for _, c := range j.Caches {
		for _, o := range j.Outputs {
			if cachemount.Inside(path.Clean(o.Path), c.Target) {
				return fmt.Errorf("output %q is in the cache directory at %q, of which nothing comes out: %w", o.Path, c.Target, errdefs.ErrInvalidArgument)
			}
		}
	}
	if len(j.Caches) > 0 && !j.Private {
		return fmt.Errorf("cache directories need a mount namespace: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// skip lists what below the source is not source: the store and what the run
// itself writes.
func (j *Job) skip() []string {
	paths := []string{j.Root}
	for _, o := range j.Outputs {
		paths = append(paths, o.Dest)
	}
	return paths
}

// dir is the path at which the command sees its workspace. In one store it
// depends on the key alone, so tools that keep absolute paths stay
// incremental.
func (j *Job) dir() string { return filepath.Join(j.Root, "workspaces", dirName(j.Key)) }
