// Command cmd is hack/bench --no-peer: it measures Lamina and the disk alone.
package main

import (
	"os"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
)

func main() { os.Exit(bench.Command(ours.Opener())) }
