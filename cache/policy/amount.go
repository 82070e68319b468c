package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
)

// Amount is an amount of space: bytes, or a part of the disk. The zero value is
// no bytes.
type Amount struct {
	bytes   int64
	percent float64
	ofDisk  bool
}

// Bytes is an amount of n bytes.
func Bytes(n int64) *Amount { return &Amount{bytes: n} }

// Percent is an amount of p percent of the disk.
func Percent(p float64) *Amount { return &Amount{percent: p, ofDisk: true} }

// amountExamples is what a message about a bad amount shows.
const amountExamples = `10GB, 512MiB or 20%`

// ParseAmount reads a number of bytes, with a unit of powers of 1000 (MB) or
// 1024 (MiB) if there is one, or a percentage of the disk ("20%"). Errors are
// *SyntaxError.
func ParseAmount(text string) (*Amount, error) {
	bad := func(at int, format string, args ...any) (*Amount, error) {
		return nil, &SyntaxError{What: "amount", Text: text, At: at, Reason: fmt.Sprintf(format, args...), Example: amountExamples}
	}
	at := blanks(text, 0)
	end := digits(text, at)
	number, unitAt := text[at:end], blanks(text, end)
	unit := strings.TrimSpace(text[unitAt:])
	n, err := strconv.ParseFloat(number, 64)
	switch {
	case number == "":
		return bad(at, "a number is missing")
	case err != nil:
		return bad(at, "%q is no number", number)
	case unit == "%":
		if n > 100 {
			return bad(at, "there are 100%% at most")
		}
		return Percent(n), nil
	}
	// The library would take a comma for a part of the number.
	if _, err := humanize.ParseBytes("1" + unit); err != nil || strings.Contains(unit, ",") {
		return bad(unitAt, "there is no unit %q", clip(unit))
	}
	bytes, err := humanize.ParseBytes(number + unit)
	if err != nil || bytes > math.MaxInt64 {
		return bad(at, "it is too large")
	}
	return Bytes(int64(bytes)), nil
}

// blanks is the place behind the blanks at a place of text, digits that behind
// the number there.
func blanks(text string, at int) int {
	for at < len(text) && (text[at] == ' ' || text[at] == '\t') {
		at++
	}
	return at
}

func digits(text string, at int) int {
	for at < len(text) && (text[at] == '.' || text[at] >= '0' && text[at] <= '9') {
		at++
	}
	return at
}

// Of is the amount in bytes on a disk.
func (a *Amount) Of(d Disk) int64 {
	if a.ofDisk {
		return int64(a.percent / 100 * float64(d.Total))
	}
	return a.bytes
}

func (a *Amount) validate() error {
	switch {
	case a.ofDisk && !(a.percent >= 0 && a.percent <= 100):
		return fmt.Errorf("%s is not between 0%% and 100%%: %w", a, errdefs.ErrInvalidArgument)
	case !a.ofDisk && a.bytes < 0:
		return fmt.Errorf("%d bytes are negative: %w", a.bytes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// String is the amount as ParseAmount reads it.
func (a *Amount) String() string {
	if a.ofDisk {
		return strconv.FormatFloat(a.percent, 'g', -1, 64) + "%"
	}
	return strconv.FormatInt(a.bytes, 10)
}

// MarshalJSON writes bytes as a number and percentages as a string.
func (a Amount) MarshalJSON() ([]byte, error) {
	if a.ofDisk {
		return json.Marshal(a.String())
	}
	return json.Marshal(a.bytes)
}

// UnmarshalJSON reads a number of bytes, or what ParseAmount reads.
func (a *Amount) UnmarshalJSON(data []byte) error {
	var text string
	if json.Unmarshal(data, &text) != nil {
		text = string(data)
		if _, err := strconv.ParseInt(text, 10, 64); err != nil {
			return &SyntaxError{What: "amount", Text: text, Reason: "it is neither a string nor a number of bytes", Example: `"10GB", "20%" or 1000000`}
		}
	}
	got, err := ParseAmount(text)
	if err == nil {
		*a = *got
	}
	return err
}

// Duration is a time span that is written with units up to weeks.
type Duration time.Duration

// durationExamples is what a message about a bad duration shows.
const durationExamples = `48h, 7d or 2d12h`

// durationUnit is a unit of a duration, with its value.
type durationUnit struct {
	name string
	is   time.Duration
}

// durationUnits are all, from large to small.
func durationUnits() []durationUnit {
	return []durationUnit{
		{"w", 7 * 24 * time.Hour},
		{"d", 24 * time.Hour},
		{"h", time.Hour},
		{"m", time.Minute},
		{"s", time.Second},
		{"ms", time.Millisecond},
		{"us", time.Microsecond},
		{"µs", time.Microsecond},
		{"μs", time.Microsecond},
		{"ns", time.Nanosecond},
	}
}

// ParseDuration reads Go's durations, with days ("d", of 24 hours) and weeks
// ("w") beside, units from large to small: "90m", "2d12h", "1w". Errors are
// *SyntaxError.
func ParseDuration(text string) (Duration, error) {
	bad := func(at int, format string, args ...any) (Duration, error) {
		return 0, &SyntaxError{What: "duration", Text: text, At: at, Reason: fmt.Sprintf(format, args...), Example: durationExamples}
	}
	at := blanks(text, 0)
	end := max(at, len(strings.TrimRight(text, " \t")))
	if text[at:end] == "0" {
		return 0, nil
	}
	sum, last := time.Duration(0), time.Duration(math.MaxInt64)
	for first := true; first || at < end; first = false {
		unitAt := digits(text[:end], at)
		number, next := text[at:unitAt], unitAt
		for next < end && !strings.ContainsRune(".0123456789 \t", rune(text[next])) {
			next++
		}
		unit := text[unitAt:next]
		units := durationUnits()
		k := slices.IndexFunc(units, func(u durationUnit) bool { return u.name == unit })
		switch {
		case number == "":
			return bad(at, "a number is missing")
		case unit == "":
			return bad(unitAt, "a unit is missing")
		case k < 0:
			return bad(unitAt, "there is no unit %q, but w, d, h, m, s, ms, us and ns", clip(unit))
		case units[k].is >= last:
			return bad(at, "units go from large to small")
		}
		last = units[k].is
		part, err := multiply(number, last)
		if err != nil {
			return bad(at, "%q is no number", number)
		}
		if part > math.MaxInt64/2-sum {
			return bad(at, "it is too long")
		}
		sum += part
		at = next
	}
	return Duration(sum), nil
}

// multiply is a decimal number of units. Too large is the largest there is.
func multiply(number string, unit time.Duration) (time.Duration, error) {
	whole, fraction, _ := strings.Cut(number, ".")
	n, f := int64(0), 0.0
	var err error
	if whole != "" {
		n, err = strconv.ParseInt(whole, 10, 64)
	}
	if errors.Is(err, strconv.ErrRange) || err == nil && n > math.MaxInt64/int64(unit)-1 {
		return math.MaxInt64, nil
	}
	if err == nil && (fraction != "" || whole == "") {
		f, err = strconv.ParseFloat("0."+fraction, 64)
		if fraction == "" {
			err = strconv.ErrSyntax
		}
	}
	return time.Duration(n)*unit + time.Duration(math.Round(f*float64(unit))), err
}

// String is the duration as ParseDuration reads it.
func (d Duration) String() string {
	const day = Duration(24 * time.Hour)
	if d >= day && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	return time.Duration(d).String()
}

// MarshalJSON writes the duration as a string.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(d.String()) }

// UnmarshalJSON reads what ParseDuration reads. Numbers have no unit, so they
// are refused.
func (d *Duration) UnmarshalJSON(data []byte) error {
	var text string
	if json.Unmarshal(data, &text) != nil {
		return &SyntaxError{What: "duration", Text: string(data), Reason: "it is no string with a unit", Example: `"48h" or "7d"`}
	}
	got, err := ParseDuration(text)
	if err == nil {
		*d = got
	}
	return err
}

// bytesText is a number of bytes for people.
func bytesText(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
