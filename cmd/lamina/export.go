package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/workspace/treetar"
)

func newExport(a *app) *cobra.Command {
	var o exportOptions
	cmd := &cobra.Command{
		Use:   "export ID [PATH] [--format tar|oci] [--compression none|gzip|zstd[:LEVEL]] [-o FILE]",
		Short: "Write the tree of a record as an archive",
		Example: `  lamina export key:app | tar -tvf -
  lamina export key:app bin -o bin.tar
  lamina export 01JCXM --compression zstd -o tree.tar.zst`,
		Long: `Write the tree of a record, or what lies at PATH in it, as a tar archive to
standard output or to FILE, which appears complete or not at all. The same tree
gives the same bytes: entries are sorted, with times in nanoseconds, numeric
owners, extended attributes and hard links. Sockets are left out, holes are zeros.

The record is only looked at. The format oci is not there yet.`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.completeIDs(1)(cmd, args, prefix)
		},
		Annotations: map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			compress, err := parseCompression(o.compression)
			switch {
			case err != nil:
				return usage(cmd, err)
			case o.format == "oci":
				return fmt.Errorf("--format oci is not there yet, only tar: %w", errdefs.ErrNotImplemented)
			case o.format != "tar":
				return usagef(cmd, "--format %q: there are tar and oci", clip(o.format))
			case cmd.Flags().Changed("output") && o.file == "":
				return usagef(cmd, "-o is empty")
			case (o.file == "" || o.file == "-") && isTerminal(a.out):
				return usagef(cmd, "standard output is a terminal: name a file with -o, or use a pipe")
			}
			if len(args) == 2 {
				o.path = args[1]
			}
			return a.export(cmd.Context(), args[0], o, compress)
		},
	}
	cmd.Flags().StringVar(&o.format, "format", "tar", "`FORMAT`: tar or oci")
	cmd.Flags().StringVar(&o.compression, "compression", "none", "`TYPE[:LEVEL]`: none, gzip or zstd")
	cmd.Flags().StringVarP(&o.file, "output", "o", "", "write to `FILE`")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]cobra.Completion{"tar", "oci"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("compression", cobra.FixedCompletions([]cobra.Completion{"none", "gzip", "zstd"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

type exportOptions struct {
	path, format, compression, file string
}

// compressor wraps a writer; its Close ends the compressed stream only.
type compressor func(io.Writer) (io.WriteCloser, error)

func parseCompression(s string) (compressor, error) {
	name, level, leveled := strings.Cut(s, ":")
	n, err := strconv.Atoi(level)
	bad := leveled && (err != nil || n < 1)
	switch {
	case name == "none" && !leveled:
		return func(w io.Writer) (io.WriteCloser, error) { return plain{w}, nil }, nil
	case name == "gzip" && !bad && n <= gzip.BestCompression:
		if !leveled {
			n = gzip.DefaultCompression
		}
		return func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriterLevel(w, n) }, nil
	case name == "zstd" && !bad && n <= 22:
		if !leveled {
			n = 3 // zstd's own default
		}
		// One thread: with several the bytes would depend on the machine.
		return func(w io.Writer) (io.WriteCloser, error) {
			return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(n)), zstd.WithEncoderConcurrency(1))
		}, nil
	}
	return nil, fmt.Errorf("--compression %q: it takes none, gzip[:1-9] or zstd[:1-22]", clip(s))
}

type plain struct{ io.Writer }

func (plain) Close() error { return nil }

type exportView struct {
	stateView
	Entries int64 `json:"entries"`
	Bytes   int64 `json:"bytes"`
}

func (a *app) export(ctx context.Context, arg string, o exportOptions, compress compressor) error {
	h, err := a.take(ctx, arg, false, false)
	if err != nil {
		return err
	}
	var done atomic.Int64
	stop := a.progress("exporting", func() string { return size(done.Load()) })
	var stats treetar.Stats
	err = a.writeTo(o.file, func(w io.Writer) error {
		c, err := compress(w)
		if err != nil {
			return err
		}
		stats, err = treetar.Write(ctx, c, h.path, o.path, treetar.Options{Progress: done.Store})
		if err != nil {
			return err
		}
		return c.Close()
	})
	stop()
	if err = errors.Join(err, h.end()); err != nil {
		return about(h.state.ID, fmt.Errorf("export record %s: %w", h.state.ID, err))
	}
	if stats.Sockets > 0 {
		fmt.Fprintf(a.err, "lamina: %s left out\n", plural(int(stats.Sockets), "socket"))
	}
	if a.json {
		w := a.err
		if o.file != "" && o.file != "-" {
			w = a.out
		}
		return printJSON(w, exportView{h.state, stats.Entries, stats.Bytes})
	}
	return nil
}

// writeTo gives fill a place for what it writes: standard output, or a file
// that gets its name when it is complete and on the disk.
func (a *app) writeTo(name string, fill func(io.Writer) error) (err error) {
	if name == "" || name == "-" {
		w := bufio.NewWriterSize(a.out, 256<<10)
		if err := fill(w); err != nil {
			return err
		}
		return w.Flush()
	}
	if st, serr := os.Stat(name); serr == nil && !st.Mode().IsRegular() {
		if st.IsDir() {
			return fmt.Errorf("-o %s is a directory: %w", name, errdefs.ErrInvalidArgument)
		}
		// A pipe or a device cannot be replaced.
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(fill(f), f.Close())
	}
	// A link stays one: the file that it names is replaced.
	if target, lerr := filepath.EvalSymlinks(name); lerr == nil {
		name = target
	}
	if err := a.mayMake(name); err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(name), ".lamina-"+rand.Text()+".tmp")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return fmt.Errorf("make a file beside %s: %w", name, err)
	}
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temp, name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}
