package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/contenthash"
)

func newCompare(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "compare ID ID",
		Short: "List the paths at which two records differ",
		Example: `  lamina compare "$parent" "$child"
  lamina compare 01JCXM key:app
  lamina compare 01JCXM 01JCXN --json | jq -r .path`,
		Long: `List the paths at which the trees of two records differ, sorted, one a line:
added is what only the second has, removed what only the first has, modified what
differs in content, type or attributes (of a directory: its own attributes). Times
do not count.

The digests are compared from the top down: a directory that is equal is not
looked into, and no file is read whose digest is known (see lamina hash).`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeIDs(2),
		Annotations:       map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.compare(cmd.Context(), args)
		},
	}
}

type compareView struct {
	Path   string `json:"path"`
	Change string `json:"change"`
}

func (a *app) compare(ctx context.Context, args []string) error {
	var found []contenthash.Difference
	err := a.withTrees(ctx, args, func(recs []*hashed) error {
		found = found[:0]
		for d, err := range contenthash.Compare(ctx, recs[0].side(), recs[1].side()) {
			if err != nil {
				return fmt.Errorf("compare records %s and %s: %w", recs[0].id, recs[1].id, err)
			}
			found = append(found, d)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, d := range found {
		v := compareView{Path: "/" + d.Path, Change: changeText(d.Change)}
		if a.json {
			v.Path = printable([]byte(v.Path))
			err = printJSON(a.out, v)
		} else {
			_, err = fmt.Fprintf(a.out, "%-8s %s\n", v.Change, safe(v.Path))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func changeText(c contenthash.ChangeKind) string {
	switch c {
	case contenthash.Add:
		return "added"
	case contenthash.Delete:
		return "removed"
	default:
		return "modified"
	}
}
