package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace"
	"github.com/lamina-build/lamina/workspace/cachemount"
	"github.com/lamina-build/lamina/workspace/output"
	"github.com/lamina-build/lamina/workspace/sandbox"
	"github.com/lamina-build/lamina/workspace/source"
)

// runView is the JSON form of a run.
type runView struct {
	workspace.Result
	DurationMS int64 `json:"duration_ms"`
}

// run hands a run over to the library and tells how it went.
func (a *app) run(ctx context.Context, cmd *cobra.Command, o runOptions) error {
	job, err := a.job(o)
	if err != nil {
		return usage(cmd, err)
	}
	if job.Source != "" {
		if err := a.mayRead(job.Source); err != nil {
			return fmt.Errorf("--src: %w", err)
		}
	}
	progress := &syncProgress{a: a}
	job.Progress = progress.update
	job.OnStart = func(res workspace.Result) {
		progress.end()
		a.say("running in workspace %q (%s)", o.key, reasons(res))
	}
	job.OnCached = func() {
		progress.end()
		a.say("cached: nothing changed since the last run of %q", o.key)
	}
	res, err := workspace.Run(ctx, job)
	progress.end()
	var start *sandbox.StartError
	if errors.As(err, &start) {
		a.complain(cmd, err)
		return statusError(start.Status())
	}
	if err != nil {
		if res.ID != "" {
			err = about(res.ID, err)
		}
		return err
	}
	if a.json {
		text, err := json.Marshal(runView{res, res.Duration.Milliseconds()})
		if err != nil {
			return err
		}
		fmt.Fprintf(a.err, "%s\n", text)
	} else if res.ExitCode != 0 {
		fmt.Fprintf(a.err, "lamina: the command ended with exit status %d; its workspace is kept for the next run\n", res.ExitCode)
	}
	if res.ExitCode != 0 {
		return statusError(res.ExitCode)
	}
	return nil
}

// reasons says in one line why a command runs.
func reasons(res workspace.Result) string {
	var out, paths []string
	for _, why := range res.Why {
		if path, ok := strings.CutPrefix(why, "source:"); ok {
			paths = append(paths, path)
		} else {
			out = append(out, why)
		}
	}
	if at := slices.Index(out, "source"); at >= 0 && len(paths) > 0 {
		out[at] += ": " + strings.Join(paths, ", ")
		if more := res.SourceChanges - len(paths); more > 0 {
			out[at] += fmt.Sprintf(" and %d more", more)
		}
	}
	return strings.Join(out, ", ")
}

// job turns flags into a job. Its errors are errors of usage.
func (a *app) job(o runOptions) (workspace.Job, error) {
	root, err := a.root()
	if err != nil {
		return workspace.Job{}, err
	}
	j := workspace.Job{
		Root: root,
		Open: func(ctx context.Context, readOnly bool) (*cache.Manager, error) {
			if readOnly {
				m, err := a.open(ctx, looking)
				var none *noStoreError
				if errors.As(err, &none) && !none.legacy {
					err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
				}
				return m, err
			}
			return a.open(ctx, making)
		},
		Key: o.key, Args: o.args, Source: o.src, Exclude: o.exclude,
		IgnoreEnv: o.ignoreEnv, NoMemo: o.noMemo, NoWait: o.noWait,
		Private: a.namespace != nil && a.namespace.Private,
		Stdout:  os.Stdout, Stderr: os.Stderr,
		OnWait: a.sayRunWaits,
		OnCacheWait: func(c cachemount.Spec, h cache.Holder) {
			a.say("waiting for %s, which has the cache directory %q", h, c.ID)
		},
		OnNote: func(n source.Note) { a.say("%s: %s", n.Path, n.Reason) },
	}
	if j.Env, err = environment(os.Environ(), o.env); err != nil {
		return j, err
	}
	for _, s := range o.out {
		spec, err := output.ParseSpec(s)
		if err != nil {
			return j, fmt.Errorf("--out %q: %w", s, err)
		}
		j.Outputs = append(j.Outputs, spec)
	}
	if j.Labels, err = parseLabels(o.labels); err != nil {
		return j, err
	}
	for _, s := range o.mounts {
		if strings.HasPrefix(s, "type=") {
			c, err := cachemount.ParseSpec(s)
			if err != nil {
				return j, fmt.Errorf("--mount: %w", err)
			}
			j.Caches = append(j.Caches, c)
			continue
		}
		t, err := parseMount(s)
		if err != nil {
			return j, fmt.Errorf("--mount %q: %w", s, err)
		}
		j.Mounts = append(j.Mounts, t)
	}
	if j.Caches, err = cachemount.Check(j.Caches); err != nil {
		return j, fmt.Errorf("--mount: %w", err)
	}
	return j, nil
}

// syncProgress shows how far the sync of the source is, from its first byte to
// the start of the command.
type syncProgress struct {
	a           *app
	start       sync.Once
	stop        func()
	done, total atomic.Int64
}

func (p *syncProgress) update(done, total int64) {
	p.done.Store(done)
	p.total.Store(total)
	p.start.Do(func() {
		p.stop = p.a.progress("syncing the source", func() string {
			return humanize.IBytes(uint64(p.done.Load())) + " of " + humanize.IBytes(uint64(p.total.Load()))
		})
	})
}

// end clears the line. Nothing is shown after it.
func (p *syncProgress) end() {
	p.start.Do(func() {})
	if p.stop != nil {
		p.stop()
		p.stop = nil
	}
}

func (a *app) say(format string, args ...any) {
	if !a.json {
		fmt.Fprintf(a.err, "lamina: %s\n", safe(fmt.Sprintf(format, args...)))
	}
}

func (a *app) sayRunWaits(h cache.Holder) {
	a.say("waiting for %s, which works in this workspace", h)
}

// environment is the caller's with the variables of --env: K=V sets one, K
// alone takes the caller's value and must be there.
func environment(inherited, set []string) ([]string, error) {
	env := slices.Clone(inherited)
	for _, kv := range set {
		name, _, has := strings.Cut(kv, "=")
		if name == "" || strings.ContainsRune(kv, 0) {
			return nil, fmt.Errorf("--env %q: the form is K=V, or K for a variable that is set: %w", kv, errdefs.ErrInvalidArgument)
		}
		if !has {
			value, ok := os.LookupEnv(name)
			if !ok {
				return nil, fmt.Errorf("--env %s: it is not set: %w", name, errdefs.ErrInvalidArgument)
			}
			kv = name + "=" + value
		}
		env = slices.DeleteFunc(env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		env = append(env, kv)
	}
	return env, nil
}

// parseMount reads SOURCE:TARGET[:ro].
func parseMount(s string) (t sandbox.Mount, err error) {
	parts := strings.Split(s, ":")
	if len(parts) == 3 && (parts[2] == "ro" || parts[2] == "rw") {
		t.ReadOnly = parts[2] == "ro"
		parts = parts[:2]
	}
	if len(parts) != 2 || parts[0] == "" || !filepath.IsAbs(parts[1]) {
		return t, fmt.Errorf("the form is SOURCE:TARGET[:ro], TARGET an absolute path: %w", errdefs.ErrInvalidArgument)
	}
	if t.Source, err = filepath.Abs(parts[0]); err != nil {
		return t, err
	}
	if _, err := os.Stat(t.Source); err != nil {
		return t, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	t.Target = filepath.Clean(parts[1])
	return t, nil
}
