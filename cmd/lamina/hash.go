package main

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
)

func newHash(a *app) *cobra.Command {
	var o contenthash.Options
	cmd := &cobra.Command{
		Use:   "hash ID [PATH] [--include P]... [--exclude P]... [--wildcard] [--follow] [--ignore-owners]",
		Short: "Print the digest of a record's tree",
		Example: `  lamina hash key:app
  lamina hash 01JCXM src --exclude '**/*.o'
  lamina hash 01JCXM 'lib/*.so' --wildcard --follow --json`,
		Long: `Print the digest of a record's tree, or of what lies at PATH in it: of names,
contents, modes, owners, links and extended attributes, not of times. It equals
the one that BuildKit computes for the same tree and options.

What was found out is kept with the record: the next question reads no file, also
after a commit or a finalize, and that for a child reads only what its own layer
changed. After a reopen each file is looked at once, and read only if it changed.

--include and --exclude take patterns as in .dockerignore, relative to PATH; with
--wildcard PATH is a pattern itself; --follow follows a symbolic link at its end.

--ignore-owners counts every owner as 0:0, as BuildKit does with the files of a
build context. It reads all files each time. The source_digest of lamina run is
this digest of the source alone: in a workspace where nothing but bin was built

  lamina hash key:app --ignore-owners --include '**' --exclude bin`,
		Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.completeIDs(1)(cmd, args, prefix)
		},
		Annotations: map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "/"
			if len(args) > 1 {
				if path = args[1]; path == "" {
					return usagef(cmd, "PATH is empty")
				}
			}
			return a.hash(cmd.Context(), args[0], path, o)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&o.IncludePatterns, "include", nil, "only what matches `P`")
	flags.StringArrayVar(&o.ExcludePatterns, "exclude", nil, "leave out what matches `P`")
	flags.BoolVar(&o.Wildcard, "wildcard", false, "PATH is a pattern")
	flags.BoolVar(&o.FollowLinks, "follow", false, "follow a symbolic link at the end of PATH")
	flags.BoolVar(&o.IgnoreOwners, "ignore-owners", false, "owners do not count")
	return cmd
}

type hashView struct {
	ID     cache.ID      `json:"id"`
	Path   string        `json:"path"`
	Digest digest.Digest `json:"digest"`
}

func (a *app) hash(ctx context.Context, arg, path string, o contenthash.Options) error {
	v := hashView{Path: printable([]byte(path))}
	err := a.withTrees(ctx, []string{arg}, func(recs []*hashed) (err error) {
		v.ID = recs[0].id
		v.Digest, err = recs[0].tree.Checksum(ctx, recs[0].open, path, o)
		if err != nil {
			err = fmt.Errorf("hash record %s: %w", recs[0].id, err)
		}
		return err
	})
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(a.out, v)
	}
	_, err = fmt.Fprintln(a.out, v.Digest)
	return err
}
