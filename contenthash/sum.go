package contenthash

import (
	"crypto/sha256"
)

// sumUp computes the digest of the directory n from the facts below it, and
// says whether they are all known. The caller holds mu for writing.
//
// The form is the peer's: a NUL byte and the digest of the directory's header,
// then for each entry, in the order of the names' bytes, a NUL byte, the name
// and the entry's digest.
func (t *Tree) sumUp(n *node) bool {
	s := summer{t: t}
	return s.dir(n)
}

type summer struct {
	t *Tree
	// bufs are those of directories that are done.
	bufs [][]byte
}

func (s *summer) dir(n *node) bool {
	d := n.dir
	if d.hasSum && d.sumEpoch >= s.t.trusted {
		return true
	}
	if !s.t.trusts(n) || !n.has(fDigest) || !d.listed {
		return false
	}
	for _, c := range d.children {
		if c.kind == kindDir {
			if !s.dir(c) {
				return false
			}
		} else if !c.has(fDigest) || !s.t.trusts(c) {
			return false
		}
	}
	d.sumEpoch = s.t.epoch
	if d.hasSum {
		return true // all it was made of holds
	}
	buf := s.buffer()
	buf = appendDigest(append(buf, 0), &n.digest)
	for _, c := range d.children {
		buf = appendEntry(buf, c, "")
	}
	d.sum = sha256.Sum256(buf)
	d.hasSum = true
	s.bufs = append(s.bufs, buf)
	return true
}

func (s *summer) buffer() []byte {
	if n := len(s.bufs); n > 0 {
		buf := s.bufs[n-1][:0]
		s.bufs = s.bufs[:n-1]
		return buf
	}
	return make([]byte, 0, 8<<10)
}

// appendEntry appends an entry of a directory that is being summed up.
//
// After a subdirectory the peer goes on at the first path behind it, which it
// takes to be the one with the byte 0xff after the separator. So entries of a
// subdirectory whose names begin with that byte are counted once more by the
// directory above, under their path from there. It distinguishes no less, and
// keys survive, so it is done here, too.
func appendEntry(buf []byte, c *node, prefix string) []byte {
	buf = append(append(append(buf, 0), prefix...), c.name...)
	if c.kind != kindDir {
		return appendDigest(buf, &c.digest)
	}
	buf = appendDigest(buf, &c.dir.sum)
	i, _ := c.index("\xff")
	for _, again := range c.dir.children[i:] {
		buf = appendEntry(buf, again, prefix+c.name+"\x00")
	}
	return buf
}
