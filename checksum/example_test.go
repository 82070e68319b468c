package checksum_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "lamina-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	m, err := cache.Open(ctx, cache.Options{
		Root:       filepath.Join(dir, "cache"),
		DriverName: "native", NoMounts: os.Geteuid() != 0,
		Unconfirm: contenthash.UnconfirmStored,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	sums := checksum.New(m, checksum.Options{})
	defer sums.Close()

	ref := exampleRecord(ctx, m)
	defer ref.Release(ctx)
	d, err := sums.Checksum(ctx, ref, "/src", contenthash.Options{
		ExcludePatterns: []string{"**/*.o"},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(d.Algorithm(), len(d.Encoded()))
	// Output: sha256 64
}

func ExampleKeeper_Reopen() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "lamina-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	m, err := cache.Open(ctx, cache.Options{
		Root: filepath.Join(dir, "cache"), DriverName: "native", NoMounts: os.Geteuid() != 0,
		Unconfirm: contenthash.UnconfirmStored,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	sums := checksum.New(m, checksum.Options{})
	defer sums.Close()
	ref := exampleRecord(ctx, m)
	before, err := sums.Checksum(ctx, ref, "/", contenthash.Options{})
	if err != nil {
		log.Fatal(err)
	}
	id := ref.ID()
	if err := ref.Release(ctx); err != nil {
		log.Fatal(err)
	}

	mut, w, err := sums.Reopen(ctx, id, cache.ReopenOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer mut.Release(ctx)
	if err := exampleWrite(ctx, mut, "src/main.c", "int main() { return 1; }\n"); err != nil {
		log.Fatal(err)
	}
	err = w.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "src/main.c"})
	if err != nil {
		log.Fatal(err)
	}
	imm, err := w.Commit(ctx, cache.CommitOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer imm.Release(ctx)

	now, err := sums.Checksum(ctx, imm, "/", contenthash.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("another digest:", now != before)
	// Output: another digest: true
}

// exampleRecord commits a snapshot with a source file.
func exampleRecord(ctx context.Context, m *cache.Manager) *cache.ImmutableRef {
	mut, err := m.New(ctx, nil, cache.NewOptions{})
	if err != nil {
		log.Fatal(err)
	}
	if err := exampleWrite(ctx, mut, "src/main.c", "int main() { return 0; }\n"); err != nil {
		log.Fatal(err)
	}
	ref, err := mut.Commit(ctx)
	if err != nil {
		log.Fatal(err)
	}
	return ref
}

func exampleWrite(ctx context.Context, mut *cache.MutableRef, name, text string) error {
	mnt, err := mut.Mount(ctx, cache.MountOptions{})
	if err != nil {
		return err
	}
	path := filepath.Join(mnt.Path(), name)
	err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644))
	return errors.Join(err, mnt.Unmount())
}
