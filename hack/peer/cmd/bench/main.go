// Command bench is hack/bench: it measures Lamina, its peer and the disk side
// by side in one run.
package main

import (
	"fmt"
	"os"

	"github.com/containerd/log"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
	"github.com/lamina-build/lamina/hack/peer"
)

func main() {
	// Warnings about what a file system lacks would stand in the table.
	if err := log.SetLevel("error"); err != nil {
		fmt.Fprintln(os.Stderr, "hack/bench:", err)
		os.Exit(1)
	}
	os.Exit(bench.Command(ours.Opener(), peer.Opener()))
}
