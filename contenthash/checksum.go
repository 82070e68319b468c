package contenthash

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"
)

// maxRounds bounds how often one question is tried while somebody changes the
// files. A question of a still tree takes a handful of rounds.
const maxRounds = 100

// Checksum returns the digest of a path inside the snapshot, as BuildKit's
// contenthash gives it for the same tree and options. What the tree does not
// know it reads from the files, and remembers.
//
// Nothing there is errdefs.ErrNotFound; with patterns, a list of nothing has a
// digest, too. Bad patterns and too many links are errdefs.ErrInvalidArgument.
// A file that changes all the while is ErrChanged. Whatever fails, a digest is
// never empty without an error. What was read until then is kept, so that who
// asks again, or waits in line, goes on from there.
func (t *Tree) Checksum(ctx context.Context, open Opener, path string, o Options) (d digest.Digest, err error) {
	if o.IgnoreOwners {
		return t.withoutOwners(ctx, open, path, o)
	}
	q, err := newQuery(path, o)
	if err != nil {
		return "", err
	}
	s, known, err := t.answer(q)
	if err != nil {
		return "", err
	}
	if known {
		return digestOf(s), nil
	}
	select {
	case t.busy <- struct{}{}:
		defer func() { <-t.busy }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	s, err = t.work(ctx, open, q)
	if err != nil {
		return "", err
	}
	return digestOf(s), nil
}

// withoutOwners answers from a tree made for this question.
func (t *Tree) withoutOwners(ctx context.Context, open Opener, path string, o Options) (digest.Digest, error) {
	other := New()
	other.ownerless, other.workers, other.now, other.fault = true, t.workers, t.now, t.fault
	o.IgnoreOwners = false
	d, err := other.Checksum(ctx, open, path, o)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stats.add(other.Stats())
	return d, err
}

// answer answers without reading anything, if that is possible.
func (t *Tree) answer(q *query) (s sum, known bool, err error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.writing {
		return s, false, nil // all of it has to be validated
	}
	return (&run{t: t}).answer(q)
}

// answer answers from the tree, if it can.
func (r *run) answer(q *query) (s sum, known bool, err error) {
	if q.filtered {
		return r.filtered(q)
	}
	return r.plain(q.path, q.FollowLinks)
}

// work answers and reads what is missing by turns. The caller holds busy.
func (t *Tree) work(ctx context.Context, open Opener, q *query) (s sum, err error) {
	var root *Root
	defer func() {
		if root != nil {
			err = errors.Join(err, root.close())
		}
	}()
	t.mu.Lock()
	if t.writing {
		t.revalidate() // files may have changed since the last question
	}
	rev := t.rev
	t.mu.Unlock()
	r := &run{t: t, sums: true, missing: map[string]bool{}}
	for range maxRounds {
		t.mu.Lock()
		if t.rev != rev {
			rev = t.rev
			clear(r.missing) // what was not there may be there now
		}
		r.forgetWants()
		s, known, err := r.answer(q)
		t.mu.Unlock()
		if err != nil {
			return s, err
		}
		if known {
			return s, nil
		}
		if err := ctx.Err(); err != nil {
			return s, context.Cause(ctx)
		}
		if root == nil {
			if root, err = open(ctx); err != nil {
				return s, err
			}
		}
		f := &fetch{t: t, root: root.at(), rev: rev, missing: r.missing}
		if err := f.run(ctx, r); err != nil {
			return s, err
		}
	}
	return s, failed("hash", q.path, ErrChanged)
}
