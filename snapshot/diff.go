package snapshot

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Diff implements Stacker.
func (o *overlay) Diff(ctx context.Context, name, lower, upper string, opts ...snapshots.Opt) error {
	if err := o.diff(ctx, name, lower, upper, opts); err != nil {
		return fmt.Errorf("diff %q of %q to %q: %w", name, upper, lower, asNotFound(err))
	}
	return nil
}

func (o *overlay) diff(ctx context.Context, name, lower, upper string, opts []snapshots.Opt) error {
	for _, tree := range []string{lower, upper} {
		if tree == "" && tree != upper {
			continue
		}
		if err := o.requireCommitted(tree, errdefs.ErrFailedPrecondition); err != nil {
			return err
		}
	}
	return o.found(ctx, name, state{Clean: true}, opts, func(path string) (used snapshots.Usage, err error) {
		to := below(path, "fs")
		if err := os.Mkdir(to, 0o700); err != nil {
			return used, err
		}
		err = compared(ctx, o, Change{Lower: lower, Upper: upper}, func(from *union, list []change) error {
			return write(ctx, to, from, list, marksOf(o.info.Attributes), true, false)
		})
		if err != nil {
			return used, err
		}
		return measure(ctx, to)
	})
}
