package policy

import (
	"encoding/json"
	"fmt"
	"math"
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

// ParseAmount reads a number of bytes, with a unit of powers of 1000 (MB) or
// 1024 (MiB) if there is one, or a percentage of the disk ("20%").
func ParseAmount(text string) (*Amount, error) {
	const examples = `for example "10GB", "512MiB" or "20%"`
	t := strings.TrimSpace(text)
	if p, ok := strings.CutSuffix(t, "%"); ok {
		n, err := strconv.ParseFloat(strings.TrimSpace(p), 64)
		a := Percent(n)
		if err == nil {
			err = a.validate()
		}
		if err != nil {
			return nil, fmt.Errorf("%q is no part of a disk, %s: %w", text, examples, errdefs.ErrInvalidArgument)
		}
		return a, nil
	}
	n, err := humanize.ParseBytes(t)
	if err != nil || n > math.MaxInt64 || strings.ContainsAny(t, ",") {
		return nil, fmt.Errorf("%q is no amount of space, %s: %w", text, examples, errdefs.ErrInvalidArgument)
	}
	return Bytes(int64(n)), nil
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
			return fmt.Errorf("%s is no amount of space, for example 1000000, \"10GB\" or \"20%%\": %w", text, errdefs.ErrInvalidArgument)
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

// ParseDuration reads Go's durations, with days ("d", of 24 hours) and weeks
// ("w") beside: "90m", "2d12h", "1w".
func ParseDuration(text string) (Duration, error) {
	bad := fmt.Errorf(`%q is no duration, for example "48h", "7d" or "2d12h": %w`, text, errdefs.ErrInvalidArgument)
	rest, sum := strings.TrimSpace(text), 0.0
	if rest == "" {
		return 0, bad
	}
	for _, unit := range []struct {
		name  string
		hours float64
	}{{"w", 7 * 24}, {"d", 24}} {
		number, after, ok := strings.Cut(rest, unit.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(number, 64)
		if err != nil || !(n >= 0) {
			return 0, bad
		}
		rest, sum = after, sum+n*unit.hours*float64(time.Hour)
	}
	if rest != "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d < 0 {
			return 0, bad
		}
		sum += float64(d)
	}
	if sum > math.MaxInt64/2 {
		return 0, bad
	}
	return Duration(sum), nil
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
		return fmt.Errorf(`%s has no unit, for example "48h": %w`, data, errdefs.ErrInvalidArgument)
	}
	got, err := ParseDuration(text)
	if err == nil {
		*d = got
	}
	return err
}

// bytesText is a number of bytes for people.
func bytesText(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
