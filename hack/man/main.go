// Command man writes the manual pages of lamina. It reads the commands as
// data, as "lamina __commands" prints them, so that the generator with all that
// it needs stays out of the program itself.
//
//	lamina __commands | man DIR
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

type command struct {
	Use, Short, Long, Example string
	Flags                     []flag
	Commands                  []command
}

type flag struct {
	Name, Shorthand, Usage, Type, Default string
	NoOptDefault                          string `json:"no_opt_default"`
	Global                                bool
}

// value is a flag's value as far as a manual page shows it.
type value struct{ kind, text string }

func (v value) String() string   { return v.text }
func (v value) Type() string     { return v.kind }
func (v value) Set(string) error { return errors.New("it is for show") }

func main() {
	if err := run(os.Stdin, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "man:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: lamina __commands | man DIR")
	}
	var root command
	if err := json.NewDecoder(in).Decode(&root); err != nil {
		return fmt.Errorf("read the commands: %w", err)
	}
	if err := os.MkdirAll(args[0], 0o755); err != nil {
		return err
	}
	// The date is that of SOURCE_DATE_EPOCH, if it is set.
	header := &doc.GenManHeader{Title: "LAMINA", Section: "1", Source: "Lamina", Manual: "Lamina Manual"}
	return doc.GenManTree(build(root), header, args[0])
}

// build makes a command of cobra's that can only be described.
func build(c command) *cobra.Command {
	cmd := &cobra.Command{
		Use: c.Use, Short: c.Short, Long: c.Long, Example: c.Example,
		DisableAutoGenTag: true, DisableFlagsInUseLine: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Run:               func(*cobra.Command, []string) {},
	}
	for _, f := range c.Flags {
		set := cmd.Flags()
		if f.Global {
			set = cmd.PersistentFlags()
		}
		set.VarP(value{f.Type, f.Default}, f.Name, f.Shorthand, f.Usage)
		set.Lookup(f.Name).NoOptDefVal = f.NoOptDefault
	}
	for _, sub := range c.Commands {
		cmd.AddCommand(build(sub))
	}
	return cmd
}
