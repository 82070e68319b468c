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

// String writes an Op as parseOps reads it.
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

// operation is one thing that a history of kind H can do. do picks what it is
// about by the numbers of the Op, calls the model and the cache, and compares;
// where there is nothing to pick it does nothing.
type operation[H any] struct {
	name   string
	weight int
	do     func(h H, op Op)
}

// namesOf lists the names of operations, each as often as its weight says.
func namesOf[H any](all []operation[H]) (bag []string) {
	for _, o := range all {
		bag = append(bag, slices.Repeat([]string{o.name}, o.weight)...)
	}
	return bag
}

// perform does one operation of all.
func perform[H any](h H, all []operation[H], op Op) {
	i := slices.IndexFunc(all, func(o operation[H]) bool { return o.name == op.Name })
	all[i].do(h, op)
}

// parseOps reads a history of operations that have these names.
func parseOps(text string, names []string) (ops []Op, err error) {
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
		if err == nil && (at < 0 || !slices.Contains(names, o.Name)) {
			err = fmt.Errorf("no such operation or fault")
		}
		if err != nil {
			return nil, fmt.Errorf("operation %q: %w", word, err)
		}
		o.Fault = fault(at)
		ops = append(ops, o)
	}
	return ops, nil
}

// generate makes the history of a seed, of operations from a bag of names. What
// goes wrong does so at one of the first events of its operation, whose number
// is below reach.
func generate(seed uint64, length int, bag []string, reach int) []Op {
	rng := rand.New(rand.NewPCG(seed, 0))
	ops := make([]Op, length)
	for i := range ops {
		n := rng.Uint64()
		ops[i] = Op{Name: bag[rng.IntN(len(bag))], A: byte(n), B: byte(n >> 8), C: byte(n >> 16)}
		if n>>24%6 == 0 {
			ops[i].Fault = []fault{fail, lost, cancelled, crashSameBoot, crashOtherBoot}[rng.IntN(5)]
			// Most operations have few events.
			ops[i].At = byte(min(rng.IntN(reach), rng.IntN(reach)))
		}
	}
	return ops
}
