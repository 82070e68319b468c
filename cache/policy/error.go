package policy

import (
	"fmt"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// SyntaxError says what is wrong with a filter, an amount or a duration, and
// where. It is InvalidArgument.
type SyntaxError struct {
	// What is "filter", "amount" or "duration".
	What string
	// Text is the whole of it, and At the byte in it where the trouble begins.
	Text string
	At   int
	// Reason says what is wrong, Example what would be right.
	Reason, Example string
}

// Error shows the place.
func (e *SyntaxError) Error() string {
	at := min(max(e.At, 0), len(e.Text))
	where := fmt.Sprintf("at %d (%q)", at+1, clip(e.Text[at:]))
	if at == len(e.Text) {
		where = "at its end"
	}
	return fmt.Sprintf("%s %q, %s: %s; for example %s", e.What, clip(e.Text), where, e.Reason, e.Example)
}

// Unwrap gives the class of the error.
func (e *SyntaxError) Unwrap() error { return errdefs.ErrInvalidArgument }

// clip keeps what a message quotes short.
func clip(text string) string {
	const most = 80
	if len(text) <= most {
		return text
	}
	at := most
	for at > 0 && !utf8.RuneStart(text[at]) {
		at--
	}
	return text[:at] + "..."
}
