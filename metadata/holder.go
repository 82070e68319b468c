package metadata

import (
	"encoding/json"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// The lock is bbolt's flock on the store itself. What is in the file beside
// it is a hint for those who wait, written in place and never synced: no
// failure of it is an error.

// holderFile is where a holder says who it is.
func holderFile(path string) string { return path + ".holder" }

// maxCommand keeps the hint on one line of a terminal, and in one block.
const maxCommand = 256

// printableCommand quotes what could harm a terminal, and cuts.
func printableCommand(c string) string {
	var b strings.Builder
	for _, r := range c {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
		if b.Len() > maxCommand {
			return b.String() + "..."
		}
	}
	return b.String()
}

type holderText struct {
	PID     int       `json:"pid"`
	Command string    `json:"command"`
	Since   time.Time `json:"since"`
}

func writeHolder(path string, h Holder) {
	b, err := json.Marshal(holderText{h.PID, h.Command, h.Since})
	if err != nil {
		return
	}
	f, err := os.OpenFile(holderFile(path), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return
	}
	b = append(b, '\n')
	if _, err := f.WriteAt(b, 0); err == nil {
		_ = f.Truncate(int64(len(b)))
	}
	_ = f.Close()
}

// clearHolder is called while the lock is still held.
func clearHolder(path string) { _ = os.Truncate(holderFile(path), 0) }

// readHolder returns the zero Holder if the hint is missing or torn.
func readHolder(path string) Holder {
	f, err := os.Open(holderFile(path))
	if err != nil {
		return Holder{}
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return Holder{}
	}
	var t holderText
	if json.Unmarshal(b, &t) != nil || t.PID <= 0 {
		return Holder{}
	}
	return Holder{PID: t.PID, Command: printableCommand(t.Command), Since: t.Since}
}
