package peer

import (
	"context"
	"io/fs"
	"time"

	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/contenthash"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// storedHashes is the name of the value that holds content hashes.
const storedHashes = "buildkit.contenthash.v0"

// origin is the metadata that content hashes hang on: those of the mutable
// record while there is one.
func (i *immutable) origin() cache.RefMetadata {
	if md, ok := i.ref.GetEqualMutable(); ok {
		return md
	}
	return i.ref
}

func (i *immutable) Checksum(ctx context.Context) (string, error) {
	d, err := contenthash.Checksum(ctx, i.ref, "/", contenthash.ChecksumOpts{}, nil)
	return d.String(), err
}

func (i *immutable) ForgetChecksum(ctx context.Context, all bool) error {
	md := i.origin()
	if all {
		contenthash.ClearCacheContext(md)
		return md.SetExternal(storedHashes, nil)
	}
	cc, err := contenthash.GetCacheContext(ctx, md)
	if err != nil {
		return err
	}
	err = contenthash.SetCacheContext(ctx, md, cc) // saves
	contenthash.ClearCacheContext(md)
	return err
}

func (i *immutable) ReportChange(ctx context.Context, name string, data []byte) error {
	md := i.origin()
	cc, err := contenthash.GetCacheContext(ctx, md)
	if err != nil {
		return err
	}
	st := &fstypes.Stat{Path: name, Mode: 0o644, Size: int64(len(data))}
	h, err := contenthash.NewFromStat(st)
	if err != nil {
		return err
	}
	if _, err := h.Write(data); err != nil {
		return err
	}
	file := changed{stat: st, digest: digest.NewDigest(digest.SHA256, h)}
	if err := cc.HandleChange(fsutil.ChangeKindModify, name, file, nil); err != nil {
		return err
	}
	if _, err := cc.Checksum(ctx, i.ref, "/", contenthash.ChecksumOpts{}, nil); err != nil {
		return err
	}
	return contenthash.SetCacheContext(ctx, md, cc)
}

// changed is a file as somebody who received it reports it.
type changed struct {
	stat   *fstypes.Stat
	digest digest.Digest
}

func (c changed) Name() string          { return c.stat.Path }
func (c changed) Size() int64           { return c.stat.Size }
func (c changed) Mode() fs.FileMode     { return fs.FileMode(c.stat.Mode) }
func (c changed) ModTime() time.Time    { return time.Unix(0, c.stat.ModTime) }
func (c changed) IsDir() bool           { return false }
func (c changed) Sys() any              { return c.stat }
func (c changed) Digest() digest.Digest { return c.digest }
