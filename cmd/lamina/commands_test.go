package main

import (
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

// TestHelpTexts holds each verb to what a reader may expect of its help.
func TestHelpTexts(t *testing.T) {
	root := newRoot(newApp())
	root.InitDefaultHelpFlag()
	verbs := 0
	for _, cmd := range append(root.Commands(), root) {
		if cmd.Hidden || cmd.Name() == "help" {
			continue
		}
		verbs++
		t.Run(cmd.Name(), func(t *testing.T) {
			require.NotEmpty(t, cmd.Long)
			require.False(t, strings.HasSuffix(cmd.Short, "."), cmd.Short)
			examples := strings.Split(cmd.Example, "\n")
			require.Len(t, examples, 3)
			for _, e := range examples {
				require.True(t, strings.HasPrefix(e, "  "), e)
				require.Contains(t, e, "lamina")
				require.LessOrEqual(t, len(e), 80, e)
			}
			for line := range strings.Lines(cmd.Long) {
				require.LessOrEqual(t, len(strings.TrimSuffix(line, "\n")), 82, line)
			}
			cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { require.NotEmpty(t, f.Usage, f.Name) })
			if cmd.Runnable() && cmd != root && cmd.Name() != "run" && cmd.Name() != "completion" {
				require.NotNil(t, cmd.ValidArgsFunction, "completion would offer files")
			}
		})
	}
	require.Equal(t, 25, verbs)
}

// TestVerbsSayWhatTheyNeed keeps the namespaces right: a verb that mounts
// without saying so would mount where everybody sees it.
func TestVerbsSayWhatTheyNeed(t *testing.T) {
	want := map[string]string{
		"run": annotateMounts, "exec": annotateMounts, "export": annotateMounts,
		"hash": annotateMounts, "compare": annotateMounts, "migrate": annotateMounts,
		"new": annotateProbes, "commit": annotateProbes, "finalize": annotateProbes,
		"extract": annotateProbes, "merge": annotateProbes, "diff": annotateProbes, "import": annotateProbes, "rm": annotateProbes, "prune": annotateProbes,
		"check": annotateMounts, "sync": annotateProbes, "du": annotateProbes,
		"ls": "", "show": "", "log": "", "info": "", "version": "", "completion": "", "help": "", "__commands": "",
	}
	for _, cmd := range newRoot(newApp()).Commands() {
		annotation, ok := want[cmd.Name()]
		require.True(t, ok, "what does %s need?", cmd.Name())
		if annotation == "" {
			require.Empty(t, cmd.Annotations, cmd.Name())
		} else {
			require.Contains(t, cmd.Annotations, annotation, cmd.Name())
		}
	}
}

func TestCommandsAsData(t *testing.T) {
	v := commandViewOf(newRoot(newApp()))
	require.Equal(t, "lamina", v.Use)
	byName := map[string]commandView{}
	for _, c := range v.Commands {
		name, _, _ := strings.Cut(c.Use, " ")
		byName[name] = c
	}
	require.NotContains(t, byName, "__commands")
	require.Contains(t, byName["exec"].Flags, flagView{
		Name: "rw", Usage: "let the command change the tree", Type: "bool", Default: "false", NoOptDef: "true",
	})
	var global []string
	for _, f := range v.Flags {
		if f.Global {
			global = append(global, f.Name)
		}
	}
	require.Equal(t, []string{"driver", "json", "root", "wait"}, global)
}

func TestRunFlags(t *testing.T) {
	for _, args := range [][]string{
		{"run", "--key", "k", "--", "make", "--key", "x"},
		{"run", "--key", "k", "make", "--key", "x"},
	} {
		root := newRoot(newApp())
		cmd, rest, err := root.Find(args)
		require.NoError(t, err)
		require.Equal(t, "run", cmd.Name())
		require.NoError(t, cmd.ParseFlags(rest))
		require.Equal(t, []string{"make", "--key", "x"}, cmd.Flags().Args())
		key, err := cmd.Flags().GetString("key")
		require.NoError(t, err)
		require.Equal(t, "k", key)
	}
	// A comma does not split what is one value.
	cmd, rest, err := newRoot(newApp()).Find([]string{"run", "--exclude", "a,b", "--exclude", "c", "--env", "X=1,2", "--", "true"})
	require.NoError(t, err)
	require.NoError(t, cmd.ParseFlags(rest))
	exclude, err := cmd.Flags().GetStringArray("exclude")
	require.NoError(t, err)
	require.Equal(t, []string{"a,b", "c"}, exclude)
}
