package main

import (
	"context"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/contenthash"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/snapshot"
	"github.com/moby/sys/user"
	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

// record stands for a record of the peer's cache: as much of it as content
// hashes ask for.
type record struct {
	cache.RefMetadata // anything else that is called panics
	id                string
}

func (r *record) ID() string                                 { return r.id }
func (r *record) GetExternal(string) ([]byte, error)         { return nil, os.ErrNotExist }
func (r *record) SetExternal(string, []byte) error           { return nil }
func (r *record) GetEqualMutable() (cache.RefMetadata, bool) { return nil, false }

// tree is a directory as the peer mounts it.
type tree struct{ dir string }

func (t tree) Mount(context.Context, bool, session.Group) (snapshot.Mountable, error) {
	return t.mounts(), nil
}

func (t tree) mounts() snapshot.Mountable { return mountable(t) }

type mountable struct{ dir string }

func (m mountable) Mount() ([]mount.Mount, func() error, error) {
	// Not read-only, or the peer would mount it first.
	return []mount.Mount{{Type: "bind", Source: m.dir, Options: []string{"rbind"}}}, func() error { return nil }, nil
}

func (m mountable) IdentityMapping() *user.IdentityMapping { return nil }

// askPeer asks the peer, which knows nothing of the tree yet.
func askPeer(ctx context.Context, dir, id string, q contenthashtest.Query) (digest.Digest, error) {
	md := &record{id: id}
	cc, err := contenthash.GetCacheContext(ctx, md)
	if err != nil {
		return "", err
	}
	defer contenthash.ClearCacheContext(md)
	return cc.Checksum(ctx, tree{dir}, q.Path, contenthash.ChecksumOpts{
		FollowLinks:     q.FollowLinks,
		Wildcard:        q.Wildcard,
		IncludePatterns: q.Include,
		ExcludePatterns: q.Exclude,
		RequiredPaths:   q.Required,
	}, nil)
}
