package workspace

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	digest "github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/cache"
)

// memo is what a run depended on and how it ended. It is stored as JSON in the
// record. Values of the environment may be secrets, so digests only are kept,
// keyed with a salt of the memo's own lest short ones be guessed in bulk.
type memo struct {
	Version int               `json:"version"`
	Args    []string          `json:"args"`
	Salt    []byte            `json:"salt"`
	Env     map[string][]byte `json:"env"`
	Mounts  []string          `json:"mounts,omitempty"`
	Source  digest.Digest     `json:"source"`
	Exit    int               `json:"exit"`
	// Failed says that the command ended well, but not the run: an output was
	// not there or could not be brought out.
	Failed bool `json:"failed,omitempty"`
}

const memoVersion = 1

// newMemo is the memo of a run of j on this source.
func newMemo(j *Job, source digest.Digest, salt []byte) *memo {
	if len(salt) == 0 {
		salt = make([]byte, 16)
		rand.Read(salt)
	}
	m := &memo{Version: memoVersion, Args: j.Args, Salt: salt, Env: map[string][]byte{}, Source: source}
	ignored := append(SessionEnv(), j.IgnoreEnv...)
	for _, kv := range j.Env {
		name, value, _ := strings.Cut(kv, "=")
		if !ignores(ignored, name) {
			mac := hmac.New(sha256.New, salt)
			mac.Write([]byte(kv[:len(name)]))
			mac.Write([]byte{0})
			mac.Write([]byte(value))
			m.Env[name] = mac.Sum(nil)
		}
	}
	for _, t := range j.Mounts {
		m.Mounts = append(m.Mounts, fmt.Sprintf("%q:%q:%t", t.Source, t.Target, t.ReadOnly))
	}
	for _, c := range j.Caches {
		m.Mounts = append(m.Mounts, fmt.Sprintf("cache:%q:%q:%s", c.ID, c.Target, c.Sharing))
	}
	return m
}

func ignores(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, star := strings.CutSuffix(p, "*")
		return p == name || star && strings.HasPrefix(name, prefix)
	})
}

// memoOf reads the memo of a record; nil if it has none that can be read.
func memoOf(rec *cache.Record) *memo {
	for _, v := range rec.Values {
		if v.Name == ValueMemo {
			m := new(memo)
			if json.Unmarshal(v.Data, m) != nil || m.Version != memoVersion {
				return nil
			}
			return m
		}
	}
	return nil
}

func (m *memo) value() (cache.Value, error) {
	data, err := json.Marshal(m)
	return cache.Value{Name: ValueMemo, Data: data}, err
}

// why lists in which respects a run of j on this source differs from the run
// that m stands for. Nothing means that it need not run.
func (m *memo) why(j *Job, source digest.Digest) (why []string) {
	if j.NoMemo {
		why = append(why, "no-memo")
	}
	if m == nil {
		return append(why, "interrupted")
	}
	now := newMemo(j, source, m.Salt)
	if now.Source != m.Source {
		why = append(why, "source")
	}
	if !slices.Equal(now.Args, m.Args) {
		why = append(why, "command")
	}
	if !slices.Equal(now.Mounts, m.Mounts) {
		why = append(why, "mounts")
	}
	names := map[string]bool{}
	for name := range maps.Keys(now.Env) {
		names[name] = true
	}
	for name := range maps.Keys(m.Env) {
		names[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if a, b := now.Env[name], m.Env[name]; (a == nil) != (b == nil) || !hmac.Equal(a, b) {
			why = append(why, "env:"+name)
		}
	}
	if m.Exit != 0 || m.Failed {
		why = append(why, "failed")
	}
	return why
}
