package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	digest "github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/metadata"
)

// A blob's intent is an empty file, blobs/<digest>: it says that the blob of
// that digest may be there without a record that names it, since its record is
// about to be written or has just been removed. Blobs without an intent are
// left alone by settling, whoever wrote them.

// intentDir is the directory of the intents.
const intentDir = "blobs"

// blobsHold is the name of the hold of processes that write blobs while they
// do not have the store open.
const blobsHold = metadata.ID("blobs")

func (b *blobStore) intentPath(d digest.Digest) string {
	return filepath.Join(b.m.root, intentDir, string(d))
}

// intend makes the intent of a blob.
func (b *blobStore) intend(d digest.Digest) error {
	if err := b.m.marks.setDirty(); err != nil {
		return err
	}
	if err := b.m.step("blob intent"); err != nil {
		return err
	}
	err := os.Mkdir(filepath.Join(b.m.root, intentDir), 0o700)
	if err == nil || errors.Is(err, fs.ErrExist) {
		var f *os.File
		if f, err = os.OpenFile(b.intentPath(d), os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("note that blob %s is being written: %w", d, classify(err))
	}
	return nil
}

// intended ends the intent of a blob, if there is one.
func (b *blobStore) intended(d digest.Digest) error {
	if _, err := os.Lstat(b.intentPath(d)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := b.m.step("blob intent end")
	if err == nil {
		err = os.Remove(b.intentPath(d))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.m.setLeftover()
		return fmt.Errorf("end the intent of blob %s: %w", d, err)
	}
	return nil
}

// busy says whether somebody has a pin still, as of a Remote that was not
// released.
func (b *blobStore) busy() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.uses) > 0
}

// pin keeps the blob from being deleted until unpin. It waits for a deletion
// that is under way.
func (b *blobStore) pin(ctx context.Context, d digest.Digest) error {
	for {
		b.mu.Lock()
		u := b.uses[d]
		if u == nil {
			u = &blobUse{}
			b.uses[d] = u
		}
		if u.leaving == nil {
			u.pins++
			b.mu.Unlock()
			return nil
		}
		wait := u.leaving
		b.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// unpin takes a pin back. With the last one a blob that may have no record is
// settled.
func (b *blobStore) unpin(ctx context.Context, d digest.Digest, doubt bool) error {
	b.mu.Lock()
	u := b.uses[d]
	u.pins--
	u.doubt = u.doubt || doubt
	return b.settleUnlock(ctx, d, u)
}

// suspect settles a blob that may have lost its last record, now or when the
// last pin goes.
func (b *blobStore) suspect(ctx context.Context, d digest.Digest) error {
	b.mu.Lock()
	for {
		u := b.uses[d]
		if u == nil {
			u = &blobUse{}
			b.uses[d] = u
		}
		if u.leaving == nil {
			u.doubt = true
			return b.settleUnlock(ctx, d, u)
		}
		wait := u.leaving
		b.mu.Unlock()
		<-wait
		b.mu.Lock()
	}
}

// settleUnlock ends the use of a blob that nobody pins, and unlocks mu.
func (b *blobStore) settleUnlock(ctx context.Context, d digest.Digest, u *blobUse) (err error) {
	if u.pins > 0 {
		b.mu.Unlock()
		return nil
	}
	u.leaving = make(chan struct{})
	b.mu.Unlock()
	if u.doubt {
		err = b.settle(ctx, d)
	} else {
		err = b.intended(d)
	}
	b.mu.Lock()
	delete(b.uses, d)
	close(u.leaving)
	b.mu.Unlock()
	return err
}

// settle deletes a blob that no record names, and ends its intent. While
// another process writes blobs all stay: it may count on this one.
func (b *blobStore) settle(ctx context.Context, d digest.Digest) error {
	named, err := b.named(ctx, d)
	if err == nil && !named {
		if b.writtenElsewhere() {
			return nil
		}
		b.mu.Lock()
		delete(b.providers, d)
		b.mu.Unlock()
		if err = b.m.step("blob delete"); err == nil {
			err = b.delete(ctx, d)
		}
	}
	if err != nil {
		b.m.setLeftover()
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return b.intended(d)
}

// writtenElsewhere says whether another process writes blobs, and remembers to
// settle them at the end.
func (b *blobStore) writtenElsewhere() bool {
	busy := b.m.heldByProcess(string(blobsHold))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.skipped = b.skipped || busy
	return busy
}

// settleSkipped settles at the end what was left alone. It says whether
// something has to be left for the next open: as long as a process goes on with
// its blobs, its hold does.
func (b *blobStore) settleSkipped(ctx context.Context) (left bool) {
	b.mu.Lock()
	skipped := b.skipped
	b.mu.Unlock()
	if !skipped {
		return false
	}
	left, err := b.settleAll(ctx)
	if err != nil {
		b.m.log.Warn("unfinished blobs cannot be removed", "error", err)
	}
	return left || err != nil
}

// named says whether a record names the blob.
func (b *blobStore) named(ctx context.Context, d digest.Digest) (named bool, err error) {
	err = b.m.store.View(ctx, func(tx *metadata.Tx) error {
		for range tx.ByBlob(d) {
			named = true
			break
		}
		return nil
	})
	return named, err
}

// intentsFor makes intents for the blobs of records that are about to be
// removed. That it cannot, for want of an inode, is no reason to keep them.
func (b *blobStore) intentsFor(recs []*Record) (digests []digest.Digest) {
	for _, rec := range recs {
		for _, blob := range rec.Blobs {
			if slices.Contains(digests, blob.Digest) || blob.Digest.Validate() != nil {
				continue
			}
			digests = append(digests, blob.Digest)
			if err := b.intend(blob.Digest); err != nil {
				b.m.log.Warn("a blob is removed without a note of it", "digest", blob.Digest, "error", err)
			}
		}
	}
	return digests
}

// drop removes those of the blobs that no record names any more, and says what
// each of them occupied. What cannot be removed is tried again by the next open.
func (b *blobStore) drop(ctx context.Context, digests []digest.Digest) (freed map[digest.Digest]int64) {
	ctx = context.WithoutCancel(ctx)
	freed = map[digest.Digest]int64{}
	for _, d := range digests {
		was, err := b.occupied(ctx, d)
		if err != nil {
			b.m.log.Warn("a blob could not be measured", "digest", d, "error", err)
		}
		if err := b.suspect(ctx, d); err != nil {
			b.m.log.Warn("a blob without a record could not be removed", "digest", d, "error", err)
			continue
		}
		if _, there, err := b.size(ctx, d); err == nil && !there {
			freed[d] = was
		}
	}
	return freed
}

// settleAll removes what killed processes left: blobs with an intent that no
// record answers, and ingests of ours. It says whether something was left.
func (b *blobStore) settleAll(ctx context.Context) (left bool, err error) {
	if b.writtenElsewhere() {
		return false, nil
	}
	names, err := os.ReadDir(filepath.Join(b.m.root, intentDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	for _, n := range names {
		d := digest.Digest(n.Name())
		if d.Validate() != nil {
			continue // no intent of ours
		}
		if err := b.settle(ctx, d); err != nil {
			b.m.log.Warn("a blob cannot be settled", "digest", d, "error", err)
			left = true
		}
	}
	return left, b.abortAll(ctx)
}

// abortAll gives up the ingests of ours that killed processes left.
func (b *blobStore) abortAll(ctx context.Context) error {
	if b.given() == nil {
		return b.abortOwn()
	}
	s, err := b.open()
	if err != nil {
		return err
	}
	list, err := s.ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("list unfinished blobs: %w", err)
	}
	for _, st := range list {
		if !strings.HasPrefix(st.Ref, b.label+"-") {
			continue
		}
		if err := ignoreNotFound(s.Abort(ctx, st.Ref)); err != nil {
			return fmt.Errorf("remove unfinished blob %s: %w", st.Ref, err)
		}
	}
	return nil
}

// abortOwn is abortAll for the store in our own directory, which is not opened
// for that. A daemon that had the directory before may have left others.
func (b *blobStore) abortOwn() error {
	names, err := filepath.Glob(filepath.Join(b.dir, "ingest", "*", "ref"))
	if err != nil {
		return err
	}
	for _, name := range names {
		ref, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(ref), labelPrefix) {
			continue
		}
		if err := os.RemoveAll(filepath.Dir(name)); err != nil {
			return fmt.Errorf("remove an unfinished blob: %w", err)
		}
	}
	return nil
}
