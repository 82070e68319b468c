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
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/workspace/treetar"
)

func newExport(a *app) *cobra.Command {
	var o exportOptions
	cmd := &cobra.Command{
		Use:   "export ID [PATH] [--format tar|oci] [--compression none|gzip|zstd[:LEVEL]] [-o FILE]",
		Short: "Write a record as an archive or an image",
		Example: `  lamina export key:app | tar -tvf -
  lamina export key:app bin -o bin.tar
  lamina export key:app --format oci -o image.tar`,
		Long: `Write the tree of a record, or what lies at PATH in it, as a tar archive to
standard output or to FILE, which appears complete or not at all. The same tree
gives the same bytes: entries are sorted, with times in nanoseconds, numeric
owners, extended attributes and hard links. Sockets are left out, holes are zeros.

As tar the record is only looked at. --format oci writes an image: an OCI image
layout with the layers of the record, as a tar or, where -o is a directory or ends
with a slash, as a directory that must be empty. That finalizes the record; blobs
of its layers are made once and kept. Without --compression layers are given as
they came, or with gzip; with it all are converted. The image is called latest.`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.completeIDs(1)(cmd, args, prefix)
		},
		Annotations: map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			compression, err := parseCompression(o.compression)
			switch {
			case err != nil:
				return usage(cmd, err)
			case o.format != "tar" && o.format != "oci":
				return usagef(cmd, "--format %q: there are tar and oci", clip(o.format))
			case o.format == "oci" && len(args) == 2:
				return usagef(cmd, "--format oci writes whole records, no PATH")
			case cmd.Flags().Changed("output") && o.file == "":
				return usagef(cmd, "-o is empty")
			case (o.file == "" || o.file == "-") && isTerminal(a.out):
				return usagef(cmd, "standard output is a terminal: name a file with -o, or use a pipe")
			}
			if o.format == "oci" {
				form := cache.RemotesOptions{Create: true, Compression: compression, Force: true}
				if !cmd.Flags().Changed("compression") {
					form.Compression, form.Force = cache.Compression{Algorithm: layer.Gzip}, false
				}
				return a.exportOCI(cmd.Context(), args[0], o, form)
			}
			if len(args) == 2 {
				o.path = args[1]
			}
			return a.export(cmd.Context(), args[0], o, compression)
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

func parseCompression(s string) (c cache.Compression, err error) {
	name, level, leveled := strings.Cut(s, ":")
	c.Algorithm, err = layer.ParseAlgorithm(name)
	if err == nil && leveled {
		if c.Level, err = strconv.Atoi(level); err == nil && c.Level < 1 {
			err = fmt.Errorf("level %d: %w", c.Level, errdefs.ErrInvalidArgument)
		}
	}
	if err == nil {
		_, err = layer.Compress(io.Discard, c) // says whether there is that level
	}
	if err != nil {
		return c, fmt.Errorf("--compression %q: it takes none, gzip[:1-9] or zstd[:1-22]", clip(s))
	}
	return c, nil
}

type exportView struct {
	stateView
	Entries int64 `json:"entries"`
	Bytes   int64 `json:"bytes"`
}

func (a *app) export(ctx context.Context, arg string, o exportOptions, compression cache.Compression) error {
	h, err := a.take(ctx, arg, false, false)
	if err != nil {
		return err
	}
	var done atomic.Int64
	stop := a.progress("exporting", func() string { return size(done.Load()) })
	var stats treetar.Stats
	err = a.writeTo(o.file, func(w io.Writer) error {
		c, err := layer.Compress(w, compression)
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
