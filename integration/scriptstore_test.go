package integration

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/runlog"
)

// fingerprint NAME DIR remembers what a tree looks like: names, types, modes,
// sizes, times and contents. unchanged NAME DIR compares.
func cmdFingerprint(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: fingerprint NAME DIR")
	}
	text, err := fingerprint(ts.MkAbs(args[1]))
	ts.Check(err)
	ts.Setenv("fingerprint_"+args[0], text)
}

func cmdUnchanged(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] unchanged NAME DIR")
	}
	was := ts.Getenv("fingerprint_" + args[0])
	is, err := fingerprint(ts.MkAbs(args[1]))
	ts.Check(err)
	if was == "" || (was == is) == neg {
		ts.Fatalf("%s was\n%s\nand is\n%s", args[1], was, is)
	}
}

func fingerprint(dir string) (string, error) {
	var lines strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) {
			return nil // the overlay's own work directory
		}
		if errors.Is(err, fs.ErrNotExist) {
			lines.WriteString("nothing\n")
			return nil
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		sum := ""
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, fs.ErrPermission) {
				return err
			}
			sum = fmt.Sprintf("%x", sha256.Sum256(data))[:12]
		}
		rel, err := filepath.Rel(dir, path)
		if strings.HasSuffix(rel, ".holder") {
			// A hint for those who wait; whoever opens writes it.
			fmt.Fprintf(&lines, "%q %s %d %s\n", rel, info.Mode(), info.Size(), sum)
			return err
		}
		fmt.Fprintf(&lines, "%q %s %d %d %s %s\n", rel, info.Mode(), st.Ino, info.Size(), info.ModTime().Format("15:04:05.000000000"), sum)
		return err
	})
	return lines.String(), err
}

// seed KEY STDOUT STDERR makes a committed record with the key of a workspace
// and a log, as a run does. The store must be there.
func cmdSeed(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: seed KEY STDOUT STDERR")
	}
	ts.Check(seed(ts.Getenv("LAMINA_ROOT"), args[0], args[1], args[2]))
}

func seed(root, key, stdout, stderr string) (err error) {
	ctx := context.Background()
	log, err := runlog.NewWriter(runlog.Options{})
	if err != nil {
		return err
	}
	_, _ = io.WriteString(log.Stdout(), stdout)
	_, _ = io.WriteString(log.Stderr(), stderr)
	data, err := log.Finish()
	if err != nil {
		return err
	}
	m, err := cache.Open(ctx, cache.Options{Root: root, NoCreate: true, NoMounts: true, SyncInterval: -1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	mut, err := m.New(ctx, nil, cache.NewOptions{
		Description: "seeded", Retain: true,
		Values: []cache.Value{{Name: "workspace.key", Data: []byte(key), Index: "workspace:" + key}},
	})
	if err != nil {
		return err
	}
	if err := mut.Attach(ctx, runlog.Attachment, data); err != nil {
		return errors.Join(err, mut.Release(ctx))
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return errors.Join(err, mut.Release(ctx))
	}
	return imm.Release(ctx)
}

// schema N writes another schema version into the store.
func cmdSchema(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: schema N")
	}
	n, err := strconv.ParseUint(args[0], 10, 32)
	ts.Check(err)
	ts.Check(setSchema(filepath.Join(ts.Getenv("LAMINA_ROOT"), cache.StoreFile), uint32(n)))
}

func setSchema(path string, n uint32) error {
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		key, payload := []byte("schema"), binary.BigEndian.AppendUint32(nil, n)
		table := crc32.MakeTable(crc32.Castagnoli)
		row := binary.BigEndian.AppendUint32([]byte{1}, crc32.Update(crc32.Checksum(key, table), table, payload))
		return tx.Bucket([]byte("meta")).Put(key, append(row, payload...))
	})
	return errors.Join(err, db.Close())
}
