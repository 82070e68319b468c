package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
)

// Exit codes of Main.
const (
	exitOK = iota
	exitError
	exitUsage
)

const intro = `usage: hack/bench [--no-peer] [--quick] [--only NAME]... [--dir DIR] [--disk loop] [--sizes N,...] [--rounds N] [--json]

Measures what the operations of the cache cost, side by side with BuildKit's
cache manager and with the least that the disk and the kernel must do: one of
each per round, on the disk that holds DIR. Times are medians; tx are write
transactions and syncs the fsync, fdatasync and syncfs calls of one operation,
the same on any machine. With --json, one object a line, times in microseconds.

--no-peer leaves BuildKit out, which is else fetched and compiled for it.

Operations: %s

`

// Environment is where Main finds what it needs.
type Environment struct {
	Stdout, Stderr io.Writer
	// Terminal says that a person watches Stderr: progress goes there.
	Terminal bool
	// Syncs counts syncs, nil if nobody can.
	Syncs *Syncs
	// Command is the path of the lamina command, empty if there is none.
	Command string
	// Openers are the subjects; the first one is compared with the others.
	Openers []Opener
}

// Command is Main for a program that does nothing else. It must be called
// first thing, as CountSyncs explains.
func Command(openers ...Opener) int {
	syncs, err := CountSyncs()
	if err != nil {
		fmt.Fprintln(os.Stderr, "hack/bench: syncs are not counted:", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return Main(ctx, os.Args[1:], Environment{
		Stdout:   os.Stdout,
		Stderr:   os.Stderr,
		Terminal: term.IsTerminal(int(os.Stderr.Fd())),
		Syncs:    syncs,
		Command:  os.Getenv(CommandVariable),
		Openers:  openers,
	})
}

// settings are what the flags say.
type settings struct {
	Config
	quick, json bool
	disk        string
}

// Main parses args, measures, prints, and returns the exit code.
func Main(ctx context.Context, args []string, env Environment) int {
	s, err := parse(args, env)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	}
	start := time.Now()
	var results []Result
	measure := func(dir string) error {
		s.Dir = dir
		return Run(ctx, s.Config, func(r Result) error {
			if s.json {
				return writeJSON(env.Stdout, r)
			}
			results = append(results, r)
			return nil
		})
	}
	if s.disk == "loop" {
		s.progress("making a file system")
		err = withLoopDisk(ctx, s.Dir, diskSize(slices.Max(s.Sizes), len(s.Openers)), measure)
	} else {
		err = measure(s.Dir)
	}
	if env.Terminal {
		fmt.Fprint(env.Stderr, "\r\x1b[K")
	}
	// What was measured before an error is still worth printing.
	writeTable(env.Stdout, results)
	if err != nil {
		fmt.Fprintln(env.Stderr, "hack/bench:", err)
		return exitError
	}
	fmt.Fprintf(env.Stderr, "up to %d rounds, %s\n", s.Rounds, time.Since(start).Round(time.Second))
	return exitOK
}

// parse reads the flags. What is wrong with them has been said when it fails.
func parse(args []string, env Environment) (*settings, error) {
	s := &settings{Config: Config{Openers: env.Openers, Limits: true, Syncs: env.Syncs, Command: env.Command}}
	s.Skipped = func(name, why string) { fmt.Fprintf(env.Stderr, "hack/bench: %s is left out: %s\n", name, why) }
	flags := flag.NewFlagSet("hack/bench", flag.ContinueOnError)
	flags.SetOutput(env.Stderr)
	flags.Usage = func() {
		fmt.Fprintf(env.Stderr, intro, strings.Join(Names(), ", "))
		flags.PrintDefaults()
	}
	flags.BoolVar(&s.quick, "quick", false, "fewer rounds and only the small state: a minute or two")
	flags.BoolVar(&s.json, "json", false, "one object a line instead of a table")
	flags.StringVar(&s.Dir, "dir", "", "the `directory` in which states are built; the system's for temporary files if empty")
	flags.StringVar(&s.disk, "disk", "", "loop: a new ext4 file system in a file below the directory, for which root is needed")
	flags.IntVar(&s.Rounds, "rounds", 0, "the `number` of samples of each operation; 40, or 15 with --quick, if zero")
	flags.Func("sizes", "the `numbers` of records in the states of operations that ask for records, ascending, with commas; 1000,10000, or 1000 with --quick", s.parseSizes)
	flags.IntVar(&s.Files, "files", 0, "the `number` of files of the trees that are hashed or run in; 50000, or 5000 with --quick, if zero")
	flags.Func("only", "measure only the operation `NAME`; may be given several times, or with commas", func(v string) error {
		s.Only = append(s.Only, strings.Split(v, ",")...)
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	err := s.check(flags.Args())
	if err != nil {
		fmt.Fprintln(env.Stderr, "hack/bench:", err)
		return nil, err
	}
	s.setSizes()
	if env.Terminal {
		s.Progress = func(what string) { fmt.Fprintf(env.Stderr, "\r\x1b[K%s", what) }
	}
	return s, nil
}

func (s *settings) parseSizes(v string) error {
	for _, field := range strings.Split(v, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < chain+1 {
			return fmt.Errorf("%q is no number of at least %d", field, chain+1)
		}
		s.Sizes = append(s.Sizes, n)
	}
	if slices.Sort(s.Sizes); len(slices.Compact(slices.Clone(s.Sizes))) != len(s.Sizes) {
		return errors.New("a size is given twice")
	}
	return nil
}

func (s *settings) check(rest []string) error {
	if len(rest) > 0 {
		return fmt.Errorf("unexpected argument %q", rest[0])
	}
	if s.disk != "" && s.disk != "loop" {
		return fmt.Errorf("there is no disk %q, only loop", s.disk)
	}
	_, err := choose(s.Only)
	return err
}

// quickPatience keeps --quick below a minute on a busy machine, too; on a
// quiet one no operation needs as much.
const quickPatience = 1500 * time.Millisecond

func (s *settings) setSizes() {
	sizes, rounds, files := []int{1000, 10_000}, 40, 50_000
	if s.quick {
		sizes, rounds, files, s.Patience = []int{1000}, 15, 5000, quickPatience
	}
	if s.Files <= 0 {
		s.Files = files
	}
	if len(s.Sizes) == 0 {
		s.Sizes = sizes
	}
	if s.Rounds <= 0 {
		s.Rounds = rounds
	}
}
