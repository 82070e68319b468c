package peer

import (
	"context"
	"errors"

	"github.com/moby/buildkit/snapshot"

	"github.com/lamina-build/lamina/hack/internal/bench"
)

// Read mounts a record of the peer's and shows where.
func Read(ctx context.Context, imm bench.Immutable, look func(dir string) error) (err error) {
	mountable, err := imm.(*immutable).ref.Mount(ctx, true, nil)
	if err != nil {
		return err
	}
	m := snapshot.LocalMounter(mountable)
	dir, err := m.Mount()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Unmount()) }()
	return look(dir)
}
