package cachetest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// Op is one step of a history: an operation, numbers by which it picks what it
// is about among whatever is there when its turn comes, and what goes wrong
// meanwhile. Any list of them is a history, so one can be shortened at will.
type Op struct {
	Name    string
	A, B, C byte
	Fault   fault
	// At counts the event that goes wrong, from 1.
	At byte
}

// String writes an Op as ParseOps reads it.
func (o Op) String() string {
	s := fmt.Sprintf("%s:%d:%d:%d", o.Name, o.A, o.B, o.C)
	if o.Fault != none {
		s += fmt.Sprintf(":%s:%d", faultNames[o.Fault], o.At)
	}
	return s
}

func formatOps(ops []Op) string {
	var out []string
	for _, o := range ops {
		out = append(out, o.String())
	}
	return strings.Join(out, " ")
}

func parseOps(text string) (ops []Op, err error) {
	for _, word := range strings.Fields(text) {
		part := strings.Split(word, ":")
		o := Op{Name: part[0]}
		wrong := ""
		switch len(part) {
		case 4:
			_, err = fmt.Sscan(strings.Join(part[1:], " "), &o.A, &o.B, &o.C)
		case 6:
			_, err = fmt.Sscan(strings.Join(part[1:], " "), &o.A, &o.B, &o.C, &wrong, &o.At)
		default:
			err = fmt.Errorf("it has %d parts", len(part))
		}
		at := slices.Index(faultNames, wrong)
		if at < 0 || operationNamed(o.Name) == nil {
			err = fmt.Errorf("no such operation or fault")
		}
		if err != nil {
			return nil, fmt.Errorf("operation %q: %w", word, err)
		}
		o.Fault = []fault{none, fail, lost, cancelled, crashSameBoot, crashOtherBoot}[at]
		ops = append(ops, o)
	}
	return ops, nil
}

func operationNamed(name string) *operation {
	all := operations()
	i := slices.IndexFunc(all, func(o operation) bool { return o.name == name })
	if i < 0 {
		return nil
	}
	return &all[i]
}

// generate makes the history of a seed.
func generate(seed uint64, length int) []Op {
	rng := rand.New(rand.NewPCG(seed, 0))
	var bag []string
	for _, o := range operations() {
		bag = append(bag, slices.Repeat([]string{o.name}, o.weight)...)
	}
	ops := make([]Op, length)
	for i := range ops {
		n := rng.Uint64()
		ops[i] = Op{Name: bag[rng.IntN(len(bag))], A: byte(n), B: byte(n >> 8), C: byte(n >> 16)}
		if n>>24%6 == 0 {
			ops[i].Fault = []fault{fail, lost, cancelled, crashSameBoot, crashOtherBoot}[rng.IntN(5)]
			// Most operations have few events.
			ops[i].At = byte(min(rng.IntN(8), rng.IntN(8)))
		}
	}
	return ops
}
