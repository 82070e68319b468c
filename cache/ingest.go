package cache

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// ingest is a blob that is being written. It ends with publish or abort.
type ingest struct {
	b   *blobStore
	ref string
	w   content.Writer
}

// ingest begins to write a blob. The store is not told which: if somebody else
// writes the same one, publish finds it there.
func (b *blobStore) ingest(ctx context.Context) (*ingest, error) {
	s, err := b.open()
	if err != nil {
		return nil, err
	}
	// The next open looks for what is left of it.
	if err := b.m.marks.setDirty(); err != nil {
		return nil, err
	}
	if err := b.m.step("blob ingest"); err != nil {
		return nil, err
	}
	// A name of its own: what an earlier attempt left is not continued.
	i := &ingest{b: b, ref: b.label + "-" + rand.Text()}
	i.w, err = s.Writer(ctx, content.WithRef(i.ref))
	if err != nil {
		return nil, fmt.Errorf("write blob: %w", fullDisk(err))
	}
	return i, nil
}

// Write adds to the blob.
func (i *ingest) Write(p []byte) (int, error) { return i.w.Write(p) }

// abort gives up what was written.
func (i *ingest) abort(ctx context.Context) error {
	err := i.w.Close()
	s, oerr := i.b.open()
	if oerr != nil {
		return errors.Join(err, oerr)
	}
	err = errors.Join(err, ignoreNotFound(s.Abort(context.WithoutCancel(ctx), i.ref)))
	if err != nil {
		i.b.m.setLeftover()
	}
	return err
}

// published is a blob in the store that a record is about to name. It ends
// with its end.
type published struct {
	b      *blobStore
	digest digest.Digest
	size   int64
}

// publish gives the blob its name: from here on it is on the disk, complete
// and synced. want is the digest that it must have, if not empty. An error
// leaves nothing.
func (i *ingest) publish(ctx context.Context, want digest.Digest) (_ *published, err error) {
	b := i.b
	st, err := i.w.Status()
	got := i.w.Digest()
	if want != "" && want.Algorithm() != got.Algorithm() {
		got = want // the store reads it again to find out
	}
	if err == nil && want != "" && got != want {
		err = fmt.Errorf("blob has digest %s, not %s: %w", got, want, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, errors.Join(err, i.abort(ctx))
	}
	if err := b.pin(ctx, got); err != nil {
		return nil, errors.Join(err, i.abort(ctx))
	}
	p := &published{b: b, digest: got, size: st.Offset}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.abort(ctx), p.end(ctx, false))
		}
	}()
	if err := b.intend(got); err != nil {
		return nil, err
	}
	if err := b.m.step("blob commit"); err != nil {
		return nil, err
	}
	var opts []content.Opt
	if b.given() != nil {
		opts = append(opts, content.WithLabels(b.labels(labelWrote)))
	}
	err = i.w.Commit(ctx, st.Offset, got, opts...)
	if errdefs.IsAlreadyExists(err) {
		err = b.claim(ctx, got)
	}
	if err != nil {
		return nil, fmt.Errorf("publish blob %s: %w", got, fullDisk(err))
	}
	return p, nil
}

// adopt is publish for a blob that is in the store already, NotFound if it is
// not.
func (b *blobStore) adopt(ctx context.Context, d digest.Digest) (_ *published, err error) {
	missing := func() error { return fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound) }
	// Most are asked for before anybody has fetched them: nothing is settled
	// for those.
	if _, there, err := b.size(ctx, d); err != nil || !there {
		return nil, cmp.Or(err, missing())
	}
	if err := b.pin(ctx, d); err != nil {
		return nil, err
	}
	p := &published{b: b, digest: d}
	size, there, err := b.size(ctx, d)
	if err == nil && !there {
		err = missing()
	}
	if err == nil {
		err = b.claim(ctx, d)
	}
	if err != nil {
		return nil, errors.Join(err, p.end(ctx, true))
	}
	p.size = size
	return p, nil
}

// end says whether a record names the blob now. If not, it goes, unless
// another one does.
func (p *published) end(ctx context.Context, recorded bool) error {
	if recorded {
		p.b.m.collector.poke()
	}
	return p.b.unpin(context.WithoutCancel(ctx), p.digest, !recorded)
}
