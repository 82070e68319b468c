package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"
)

// Exit codes of Main.
const (
	exitOK = iota
	exitError
	exitUsage
)

const intro = `usage: hack/bench [--peer] [--quick] [--only NAME]... [--dir DIR] [--rounds N] [--json]

Measures what the operations of the cache cost on the disk that holds DIR.
Times are medians; tx is the number of write transactions, the same on any
machine. With --json, one object a line, times in microseconds. With --peer,
BuildKit's cache manager is measured beside ours, in the same rounds.

Operations: %s

`

// Main is the command: it parses args, measures openers and prints to stdout.
// It returns the exit code. Progress goes to stderr when terminal is set.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer, terminal bool, openers ...Opener) int {
	flags := flag.NewFlagSet("hack/bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprintf(stderr, intro, strings.Join(Names(), ", "))
		flags.PrintDefaults()
	}
	c := Config{Openers: openers}
	quick := flags.Bool("quick", false, "fewer rounds and only the small state: well below a minute")
	asJSON := flags.Bool("json", false, "one object a line instead of a table")
	flags.StringVar(&c.Dir, "dir", "", "the directory in which states are built; the system's for temporary files if empty")
	flags.IntVar(&c.Rounds, "rounds", 0, "the number of samples of each operation; 40, or 15 with --quick, if zero")
	flags.Func("only", "measure only the operation `NAME`; may be given several times, or with commas", func(v string) error {
		c.Only = append(c.Only, strings.Split(v, ",")...)
		return nil
	})
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		return exitUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "hack/bench: unexpected argument %q\n", flags.Arg(0))
		return exitUsage
	}
	if _, err := choose(c.Only); err != nil {
		fmt.Fprintln(stderr, "hack/bench:", err)
		return exitUsage
	}
	c.setSizes(*quick)
	if terminal {
		c.Progress = func(what string) { fmt.Fprintf(stderr, "\r\x1b[K%s", what) }
	}

	start := time.Now()
	var results []Result
	err := Run(ctx, c, func(r Result) error {
		if *asJSON {
			return writeJSON(stdout, r)
		}
		results = append(results, r)
		return nil
	})
	if terminal {
		fmt.Fprint(stderr, "\r\x1b[K")
	}
	// What was measured before an error is still worth printing.
	writeTable(stdout, results)
	if err != nil {
		fmt.Fprintln(stderr, "hack/bench:", err)
		return exitError
	}
	fmt.Fprintf(stderr, "%d rounds, %s\n", c.Rounds, time.Since(start).Round(time.Second))
	return exitOK
}

func (c *Config) setSizes(quick bool) {
	c.Sizes = []int{1000, 10_000}
	rounds := 40
	if quick {
		c.Sizes, rounds = []int{1000}, 15
	}
	if c.Rounds <= 0 {
		c.Rounds = rounds
	}
}
