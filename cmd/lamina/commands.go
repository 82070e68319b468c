package main

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newCommands makes a hidden verb that prints all commands with their help, as
// data: the manual pages are made of it, without the generator in this program.
func newCommands(a *app) *cobra.Command {
	return &cobra.Command{
		Use:    "__commands",
		Short:  "Print all commands as JSON",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return printJSON(a.out, commandViewOf(cmd.Root()))
		},
	}
}

type commandView struct {
	Use      string        `json:"use"`
	Short    string        `json:"short"`
	Long     string        `json:"long"`
	Example  string        `json:"example"`
	Flags    []flagView    `json:"flags"`
	Commands []commandView `json:"commands"`
}

type flagView struct {
	Name      string `json:"name"`
	Shorthand string `json:"shorthand"`
	Usage     string `json:"usage"`
	Type      string `json:"type"`
	Default   string `json:"default"`
	NoOptDef  string `json:"no_opt_default"`
	Global    bool   `json:"global"`
}

func commandViewOf(cmd *cobra.Command) commandView {
	v := commandView{Use: cmd.Use, Short: cmd.Short, Long: cmd.Long, Example: cmd.Example}
	add := func(global bool) func(*pflag.Flag) {
		return func(f *pflag.Flag) {
			name, usage := pflag.UnquoteUsage(f)
			if name == "" {
				name = f.Value.Type()
			}
			v.Flags = append(v.Flags, flagView{
				Name: f.Name, Shorthand: f.Shorthand, Usage: usage, Type: name,
				Default: f.DefValue, NoOptDef: f.NoOptDefVal, Global: global,
			})
		}
	}
	cmd.LocalNonPersistentFlags().VisitAll(add(false))
	cmd.PersistentFlags().VisitAll(add(true))
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			v.Commands = append(v.Commands, commandViewOf(c))
		}
	}
	return v
}
