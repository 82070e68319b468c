package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lamina-build/lamina/hack/internal/bench"
)

// layers is how many finalized records a chain of Legacy has below its pair.
const layers = 8

// Legacy makes the directory of a worker as a daemon leaves it that has n
// records: chains of layers, each with a file, that are finalized, and on top
// of each chain one that is committed and not finalized, which is a pair of
// records. All of it is done by the peer's own library.
func Legacy(ctx context.Context, dir string, n int) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	s, err := open(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	for made := 0; made < n; {
		var parent bench.Immutable
		for i := 0; i <= layers && made < n; i++ {
			made++
			pair := i == layers && made < n // of which there are two
			imm, err := s.layer(ctx, parent, made, !pair)
			if parent != nil {
				err = errors.Join(err, parent.Release(ctx))
			}
			if err != nil {
				return err
			}
			if parent = imm; pair {
				made++
			}
		}
		if err := parent.Release(ctx); err != nil {
			return err
		}
	}
	return nil
}

// layer makes one record.
func (s *subject) layer(ctx context.Context, parent bench.Immutable, i int, finalize bool) (bench.Immutable, error) {
	mut, err := s.New(ctx, parent, bench.Value{Name: "step", Data: fmt.Sprint("step ", i), Index: fmt.Sprintf("step::%08d", i)})
	if err != nil {
		return nil, err
	}
	err = mut.Change(ctx, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, fmt.Sprint("file-", i)), make([]byte, 4096), 0o600)
	})
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	imm, err := mut.Commit(ctx)
	if err != nil || !finalize {
		return imm, err
	}
	if err := imm.Finalize(ctx); err != nil {
		return nil, errors.Join(err, imm.Release(ctx))
	}
	return imm, nil
}
