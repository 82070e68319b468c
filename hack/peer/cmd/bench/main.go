// Command bench is hack/bench --peer: it measures Lamina and its peer side by
// side, on one disk and in one run.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/log"
	"golang.org/x/term"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
	"github.com/lamina-build/lamina/hack/peer"
)

func main() { os.Exit(run()) }

func run() int {
	// Warnings about what a file system lacks would stand in the table.
	if err := log.SetLevel("error"); err != nil {
		fmt.Fprintln(os.Stderr, "hack/bench:", err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	terminal := term.IsTerminal(int(os.Stderr.Fd()))
	return bench.Main(ctx, os.Args[1:], os.Stdout, os.Stderr, terminal, ours.Opener(), peer.Opener())
}
