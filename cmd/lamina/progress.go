package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/term"
)

// patience is how long something may take before we say that it goes on.
const patience = time.Second

// progress shows on a terminal that something goes on, from its second second
// on: what it is, how far it got if detail says so, and for how long. In a
// pipe, and in JSON, it shows nothing. stop clears the line.
func (a *app) progress(what string, detail func() string) (stop func()) {
	if a.json || !isTerminal(a.err) {
		return func() {}
	}
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		began := time.Now()
		tick := time.NewTimer(patience)
		defer tick.Stop()
		shown := false
		for {
			select {
			case <-quit:
				if shown {
					fmt.Fprint(a.err, "\r\x1b[K")
				}
				return
			case <-tick.C:
				text := ""
				if detail != nil {
					text = " " + detail()
				}
				line := fmt.Sprintf("%s%s %s", what, text, time.Since(began).Round(time.Second))
				// One that is wrapped could not be taken back.
				fmt.Fprint(a.err, "\r\x1b[K"+cut(line, columns(a.err)-1))
				shown = true
				tick.Reset(200 * time.Millisecond)
			}
		}
	}()
	return func() {
		close(quit)
		<-ended
	}
}

// columns is how wide a terminal is.
func columns(w io.Writer) int {
	const usual = 80
	if f, ok := w.(*os.File); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
			return n
		}
	}
	return usual
}

// cut is a line that is no wider than n.
func cut(line string, n int) string {
	if r := []rune(line); len(r) > n {
		return string(r[:max(n, 0)])
	}
	return line
}
