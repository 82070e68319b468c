package main

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lamina-build/lamina/cache/policy"
)

// parsed is a flag that a parser reads. What the parser says of a mistake, with
// its place and an example of what would be right, is what the user is told.
type parsed struct {
	kind  string
	text  string // what it is now, the default for the help
	parse func(string) error
}

// Set, String and Type implement pflag.Value.
func (p *parsed) Set(text string) error {
	err := p.parse(text)
	if err == nil {
		p.text = text
	}
	return err
}

func (p *parsed) String() string { return p.text }
func (p *parsed) Type() string   { return p.kind }

// durationFlag reads into d, whose value now is the default.
func durationFlag(d *time.Duration) pflag.Value {
	return &parsed{kind: "duration", text: d.String(), parse: func(text string) error {
		v, err := policy.ParseDuration(text)
		if err == nil {
			*d = time.Duration(v)
		}
		return err
	}}
}

// optionalFlag reads with parse into to, which stays nil if the flag is not
// given.
func optionalFlag[T any](kind string, to **T, parse func(string) (*T, error)) pflag.Value {
	return &parsed{kind: kind, parse: func(text string) error {
		v, err := parse(text)
		if err == nil {
			*to = v
		}
		return err
	}}
}

func parseDuration(text string) (*policy.Duration, error) {
	d, err := policy.ParseDuration(text)
	return &d, err
}

// flagError says which flag is wrong, and leaves the rest to its parser.
func flagError(_ *cobra.Command, err error) error {
	var bad *pflag.InvalidValueError
	if !errors.As(err, &bad) {
		return err
	}
	name, cause := bad.GetFlag().Name, errors.Unwrap(bad)
	if bad.GetFlag().Value.Type() == "bool" && errors.Is(cause, strconv.ErrSyntax) {
		return fmt.Errorf("--%s %q: there are true and false, for example --%s=false", name, clip(bad.GetValue()), name)
	}
	return fmt.Errorf("--%s: %w", name, cause)
}
