// Command contenthash compares the digests of package contenthash with those
// of BuildKit's own code, tree by tree, and records them for the tests.
//
//	go run ./contenthash -trees 10000          compare, in hack/peer, as root
//	go run ./contenthash -trees 2000 -record   write the golden file
//
// Trees and questions are made from the numbers 1, 2, ... by the package
// contenthashtest. Every difference is printed; one is enough for exit code 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

func main() {
	first := flag.Uint64("first", 1, "seed of the first tree")
	trees := flag.Uint64("trees", 10000, "number of trees")
	record := flag.Bool("record", false, "write the golden file of the tests")
	golden := flag.String("golden", "../../contenthash/testdata/peer.txt", "the golden file")
	dir := flag.String("dir", "", "where trees are made (default: a temporary directory)")
	flag.Parse()
	if err := run(*first, *trees, *record, *golden, *dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(first, trees uint64, record bool, golden, dir string) (err error) {
	dir, err = os.MkdirTemp(dir, "contenthash-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	lines := make([]string, trees)
	var next, different atomic.Uint64
	var wg sync.WaitGroup
	errs := make(chan error, runtime.GOMAXPROCS(0))
	for range cap(errs) {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= trees {
					return
				}
				line, ok, err := compare(dir, first+i)
				if err != nil {
					errs <- fmt.Errorf("seed %d: %w", first+i, err)
					return
				}
				if !ok {
					different.Add(1)
				}
				lines[i] = line
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		return err
	}
	if n := different.Load(); n > 0 {
		return fmt.Errorf("%d of %d trees differ", n, trees)
	}
	fmt.Printf("%d trees are equal\n", trees)
	if !record {
		return nil
	}
	return contenthashtest.WriteGolden(golden, first, lines)
}

// compare makes one tree and asks both. It returns the golden line, which is
// the peer's answers.
func compare(dir string, seed uint64) (line string, equal bool, err error) {
	tree := contenthashtest.New(seed)
	root := filepath.Join(dir, fmt.Sprint(seed))
	if err := os.Mkdir(root, 0o700); err != nil {
		return "", false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := tree.Write(root); err != nil {
		return "", false, err
	}
	ctx := context.Background()
	queries := tree.Queries(seed)
	answers := make([]string, len(queries))
	equal = true
	ours := contenthash.New()
	for i, q := range queries {
		peers, err := askPeer(ctx, root, fmt.Sprintf("%d/%d", seed, i), q)
		answers[i] = contenthashtest.Answer(peers, err)
		got, ourErr := ours.Checksum(ctx, contenthash.Dir(root), q.Path, options(q))
		if mine := contenthashtest.Answer(got, ourErr); mine != answers[i] {
			equal = false
			fmt.Printf("seed %d, question %d %+v:\n  peer %s (%v)\n  ours %s (%v)\n", seed, i, q, answers[i], err, mine, ourErr)
		}
	}
	return contenthashtest.GoldenLine(answers), equal, nil
}

func options(q contenthashtest.Query) contenthash.Options {
	return contenthash.Options{
		FollowLinks:     q.FollowLinks,
		Wildcard:        q.Wildcard,
		IncludePatterns: q.Include,
		ExcludePatterns: q.Exclude,
		RequiredPaths:   q.Required,
	}
}
