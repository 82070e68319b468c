package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// CommandVariable names the environment variable that hack/bench sets to the
// path of the command that it has built.
const CommandVariable = "LAMINA_BENCH_COMMAND"

// Operations of the command itself, each a process of its own, on a source tree
// of n files.

func commandOperations() []operation {
	return []operation{
		{
			name: "run-first", batch: 1, rounds: 5, sizes: allFiles, tool: "cp", ours: runFirst, against: copyTree,
			note: "lamina run of a command that does nothing, in a new workspace; limit: cp -a of the source",
		},
		{
			name: "run-noop", batch: 1, rounds: 8, sizes: allFiles, ours: runAgain, against: walkTree,
			note: "lamina run when nothing changed; limit: all entries of the source are looked at, by as many goroutines as there are processors",
		},
		{
			name: "run-noop-git", batch: 1, rounds: 8, sizes: allFiles, tool: "git", ours: runAgain, against: gitStatus,
			note: "the same; in the place of the limit: git status in the source",
		},
		{
			name: "run-noop-rsync", batch: 1, rounds: 8, sizes: allFiles, tool: "rsync", ours: runAgain, against: rsync,
			note: "the same; in the place of the limit: rsync -a --delete of the source to a copy that equals it",
		},
	}
}

// commands is where the command and the programs that it is compared with work.
type commands struct {
	lamina string
	dir    string
	turn   int
}

// missing says why an operation cannot be measured, if so.
func (c *Config) missing(op operation) string {
	if op.ours != nil && c.Command == "" {
		return "there is no command to measure"
	}
	if op.legacy && c.legacyOpener() == nil {
		return "there is no peer whose library makes the state of a daemon"
	}
	if op.legacy && os.Geteuid() != 0 {
		return "the state of a daemon can be made by root only"
	}
	if _, err := exec.LookPath(op.tool); op.tool != "" && err != nil {
		return op.tool + " is not installed"
	}
	return ""
}

// contenders are the command, and what it is compared with.
func (t *commands) contenders(limits bool) []contender {
	all := []contender{{name: Ours, prepare: func(ctx context.Context, op operation, n int) (sample, error) {
		return op.ours(ctx, t, n)
	}}}
	if limits {
		all = append(all, contender{name: Limit, prepare: func(ctx context.Context, op operation, n int) (sample, error) {
			return op.against(ctx, t, n)
		}})
	}
	return all
}

// source is a directory with n files, made when first asked for.
func (t *commands) source(n int) (string, error) {
	return t.made(fmt.Sprintf("source-%d", n), func(dir string) error { return writeTree(dir, n) })
}

// made is a directory below t.dir that fill fills when it is made.
func (t *commands) made(name string, fill func(dir string) error) (string, error) {
	dir := filepath.Join(t.dir, name)
	err := os.Mkdir(dir, 0o755) //nolint:gosec // a source tree
	if errors.Is(err, fs.ErrExist) {
		return dir, nil
	}
	if err == nil {
		err = fill(dir)
	}
	return dir, err
}

// execute runs a program to its end.
func execute(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %q: %w: %s", name, args, err, out.Bytes())
	}
	return nil
}

func (t *commands) run(ctx context.Context, root, source string) error {
	return execute(ctx, t.dir, t.lamina, "--root", root, "run", "--key", "bench", "--src", source, "--", "true")
}

func runFirst(_ context.Context, t *commands, n int) (sample, error) {
	source, err := t.source(n)
	t.turn++
	root := filepath.Join(t.dir, fmt.Sprintf("first-%d", t.turn))
	return sample{
		run:   func(ctx context.Context) error { return t.run(ctx, root, source) },
		after: func(context.Context) error { return removeAll(root) },
	}, err
}

func copyTree(_ context.Context, t *commands, n int) (sample, error) {
	source, err := t.source(n)
	t.turn++
	target := filepath.Join(t.dir, fmt.Sprintf("copy-%d", t.turn))
	return sample{
		run:   func(ctx context.Context) error { return execute(ctx, t.dir, "cp", "-a", source, target) },
		after: func(context.Context) error { return os.RemoveAll(target) },
	}, err
}

func runAgain(ctx context.Context, t *commands, n int) (sample, error) {
	source, err := t.source(n)
	if err != nil {
		return sample{}, err
	}
	root, err := t.made(fmt.Sprintf("again-%d", n), func(root string) error {
		if err := os.Chmod(root, 0o700); err != nil { //nolint:gosec // a directory
			return err
		}
		return t.run(ctx, root, source)
	})
	return sample{run: func(ctx context.Context) error { return t.run(ctx, root, source) }}, err
}

// walkTree looks at all entries of the source.
func walkTree(_ context.Context, t *commands, n int) (sample, error) {
	source, err := t.source(n)
	return sample{run: func(context.Context) error {
		var g errgroup.Group
		g.SetLimit(runtime.GOMAXPROCS(0))
		for from := 0; from < n; from += filesPerDir {
			g.Go(func() error {
				entries, err := os.ReadDir(filepath.Join(source, filepath.Dir(treeFile(from))))
				for _, e := range entries {
					if _, ierr := e.Info(); ierr != nil {
						return ierr
					}
				}
				return err
			})
		}
		return g.Wait()
	}}, err
}

// gitStatus looks at a source of its own, which has a repository.
func gitStatus(ctx context.Context, t *commands, n int) (sample, error) {
	source, err := t.made(fmt.Sprintf("git-%d", n), func(dir string) error {
		return errors.Join(
			writeTree(dir, n),
			execute(ctx, dir, "git", "init", "-q"),
			// Nothing goes on in the background.
			execute(ctx, dir, "git", "config", "maintenance.auto", "false"),
			execute(ctx, dir, "git", "config", "gc.auto", "0"),
			execute(ctx, dir, "git", "add", "."),
			execute(ctx, dir, "git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", "commit", "-q", "-m", "source"),
		)
	})
	return sample{run: func(ctx context.Context) error { return execute(ctx, source, "git", "status", "--porcelain") }}, err
}

func rsync(ctx context.Context, t *commands, n int) (sample, error) {
	source, err := t.source(n)
	if err != nil {
		return sample{}, err
	}
	target, err := t.made(fmt.Sprintf("rsync-%d", n), func(dir string) error {
		return execute(ctx, t.dir, "rsync", "-a", "--delete", source+"/", dir)
	})
	return sample{run: func(ctx context.Context) error {
		return execute(ctx, t.dir, "rsync", "-a", "--delete", source+"/", target)
	}}, err
}
