// Command lamina keeps warm workspaces and looks into the cache of file
// system snapshots that they live in. Each verb is a file of its own and holds
// no logic: what it does is in the libraries, so that programs can do it, too.
package main

import (
	"context"
	"os"

	"github.com/lamina-build/lamina/workspace/sandbox"
)

func main() {
	// The sandbox starts this program again as the init process of a command.
	sandbox.Init()
	os.Exit(run(os.Args[1:]))
}

// run executes one command line and gives its exit code.
func run(args []string) int {
	a := newApp()
	cmd := newRoot(a)
	cmd.SetArgs(args)
	called, err := cmd.ExecuteContextC(context.Background())
	if a.stopSignals != nil {
		err = a.stopSignals(err)
	}
	if err != nil && !a.began {
		err = usage(called, err)
	}
	if out, ok := a.out.(*stdoutFile); ok && err == nil {
		err = out.failed
	}
	return a.report(called, err)
}
