package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCommandLineHasNoValuesOfTheEnvironment(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"lamina", "ls"}, "lamina ls"},
		{
			[]string{"lamina", "run", "--env", "A=secret", "--env=B=secret", "--env", "C", "--env=D", "--key", "k=v", "--", "--env", "E=f"},
			"lamina run --env A=... --env=B=... --env C --env=D --key k=v -- --env E=f",
		},
		{[]string{"lamina", "run", "--env", "A=", "--env"}, "lamina run --env A=... --env"},
	} {
		require.Equal(t, c.want, commandLine(c.args))
	}
}
