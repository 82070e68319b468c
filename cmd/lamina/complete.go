package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

// completionWait is how long a completion waits for the store: less than a
// person takes for a hiccup of the shell.
const completionWait = 300 * time.Millisecond

type completer = func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective)

// completeIDs offers ids of records and keys of workspaces for up to most
// arguments; -1 means any number. A store that cannot be read offers nothing.
func (a *app) completeIDs(most int) completer {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		given := map[string]bool{}
		for _, arg := range args {
			given[arg] = true
		}
		var out []cobra.Completion
		for _, rec := range a.completionRecords(cmd.Context()) {
			note := rec.State.String()
			if rec.Description != "" {
				note += " " + safe(rec.Description)
			}
			names := []string{string(rec.ID)}
			if key := keyOf(rec); key != "" {
				names = append(names, keyPrefix+key)
			}
			for _, name := range names {
				if strings.HasPrefix(name, prefix) && !given[name] && safe(name) == name {
					out = append(out, cobra.CompletionWithDesc(name, note))
				}
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeKeys offers the keys of workspaces.
func (a *app) completeKeys(cmd *cobra.Command, _ []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []cobra.Completion
	for _, rec := range a.completionRecords(cmd.Context()) {
		if key := keyOf(rec); key != "" && strings.HasPrefix(key, prefix) && safe(key) == key {
			out = append(out, key)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completionRecords reads what can be read, without a word.
func (a *app) completionRecords(ctx context.Context) []*cache.Record {
	root, err := a.root()
	if err != nil {
		return nil
	}
	m, err := cache.Open(ctx, cache.Options{Root: root, ReadOnly: true, LockTimeout: completionWait})
	if err != nil {
		return nil
	}
	defer m.Close()
	var out []*cache.Record
	for rec, err := range m.Records(ctx) {
		if err == nil {
			out = append(out, rec)
		}
	}
	return out
}

// completeVerbs offers the verbs.
func completeVerbs(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []cobra.Completion
	if len(args) == 0 {
		for _, c := range cmd.Root().Commands() {
			if c.IsAvailableCommand() && strings.HasPrefix(c.Name(), prefix) {
				out = append(out, cobra.CompletionWithDesc(c.Name(), c.Short))
			}
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
