package contenthash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// V0Key is the name under which BuildKit stores content hashes.
const V0Key = "buildkit.contenthash.v0"

// Types of entries in BuildKit's form.
const (
	v0File = iota
	v0Dir
	v0Header
	v0Symlink
)

// V0 is what is known of the content hashes of a record of BuildKit's.
type V0 struct {
	// Value is what the daemon stored under V0Key; empty if it stored nothing.
	Value []byte
	// IgnoreOwners says that the daemon was older than v0.11, where owners did
	// not enter digests: what is not stored is computed like that, too.
	IgnoreOwners bool
}

// ImportV0 makes a tree that answers what the daemon would answer: from what it
// stored, and where that has nothing by its rules. As stored digests of older
// daemons cannot be mixed with others, the first change forgets all of it, and
// today's rules are in force.
//
// It always returns a tree that can be used; with a *DamagedError that is a
// new one.
func ImportV0(v V0) (*Tree, error) {
	t := New()
	t.legacy, t.ownerless = len(v.Value) > 0 || v.IgnoreOwners, v.IgnoreOwners
	in := &input{rest: v.Value}
	for len(in.rest) > 0 && in.err == nil {
		number, body := in.field()
		if number == 1 {
			t.importRecord(in, body)
		}
	}
	if in.err != nil {
		return New(), &DamagedError{Page: V0Key, Err: in.err}
	}
	t.root.epoch = t.epoch
	return t, nil
}

// field takes one field of a protobuf message; body is that of fields with a
// length, and what in the others is a number.
func (in *input) field() (number uint64, body []byte) {
	tag := in.uvarint()
	switch tag & 7 {
	case 0:
		body = binary.AppendUvarint(nil, in.uvarint())
	case 1:
		in.bytes(8)
	case 2:
		body = in.bytes(in.uvarint())
	case 5:
		in.bytes(4)
	default:
		in.fail(fmt.Errorf("field of type %d", tag&7))
	}
	return tag >> 3, body
}

// importRecord enters one path with its record.
func (t *Tree) importRecord(in *input, body []byte) {
	path, digest, link := "", "", ""
	typ := uint64(v0File)
	outer := input{rest: body}
	for len(outer.rest) > 0 && outer.err == nil {
		switch number, body := outer.field(); number {
		case 1:
			path = string(body)
		case 2:
			inner := input{rest: body}
			for len(inner.rest) > 0 && inner.err == nil {
				switch number, body := inner.field(); number {
				case 1:
					digest = string(body)
				case 2:
					typ, _ = binary.Uvarint(body)
				case 3:
					link = string(body)
				}
			}
			outer.err = errors.Join(outer.err, inner.err)
		}
	}
	if outer.err != nil {
		in.fail(outer.err)
		return
	}
	if err := t.importPath(path, digest, typ, link); err != nil {
		in.fail(fmt.Errorf("path %.200q: %w", path, err))
	}
}

func (t *Tree) importPath(path, digest string, typ uint64, link string) error {
	var own *sum
	if digest != "" { // else it was not computed yet
		d, ok := parseDigest(digest)
		if !ok {
			return fmt.Errorf("digest %.100q", digest)
		}
		own = &d
	}
	if typ == v0Header {
		var ok bool
		if path, ok = strings.CutSuffix(path, "\x00"); !ok {
			return errors.New("header of a directory without the mark of one")
		}
	}
	k := map[uint64]kind{v0File: kindFile, v0Dir: kindDir, v0Header: kindDir, v0Symlink: kindSymlink}[typ]
	if k == kindUnknown {
		return fmt.Errorf("type %d", typ)
	}
	n, err := t.importNode(path, k)
	if err != nil {
		return err
	}
	switch typ {
	case v0Dir:
		// The daemon has such an entry only with all that is below.
		n.dir.listed = true
		if own != nil {
			n.dir.sum, n.dir.hasSum, n.dir.sumEpoch = *own, true, t.epoch
		}
		return nil
	case v0Symlink:
		if link != "" && strings.IndexByte(link, 0) < 0 {
			n.link = &link
		}
	}
	if own != nil {
		n.digest = *own
		n.set(fDigest, true)
	}
	return nil
}

// importNode finds or makes the node at a path with NUL bytes before its
// names, and the directories around it.
func (t *Tree) importNode(path string, k kind) (*node, error) {
	n := t.root
	if path == "" {
		if k != kindDir {
			return nil, errors.New("the root is no directory")
		}
		return n, nil
	}
	rest, ok := strings.CutPrefix(path, "\x00")
	if !ok || len(path) > maxPath {
		return nil, errors.New("path is not in the daemon's form")
	}
	for more := true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "\x00")
		if !validName([]byte(name)) {
			return nil, fmt.Errorf("name %.100q", name)
		}
		want := kindDir
		if !more {
			want = k
		}
		c := n.child(name)
		if c == nil {
			// The daemon writes the paths in order.
			if last := len(n.dir.children) - 1; last >= 0 && n.dir.children[last].name > name {
				return nil, errors.New("is out of order")
			}
			c = &node{name: name, parent: n, epoch: t.epoch}
			t.become(c, want)
			n.dir.children = append(n.dir.children, c)
		} else if c.kind != want {
			return nil, errors.New("is of two types")
		}
		n = c
	}
	return n, nil
}
