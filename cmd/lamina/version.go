package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Example: `  lamina version
  lamina version --json
  lamina version --json | jq -r .commit`,
		Long:              `Print the version of this program and what it was built from. It needs no store.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			v := buildVersion()
			if a.json {
				return printJSON(a.out, v)
			}
			fmt.Fprintf(a.out, "lamina %s", v.Version)
			if v.Commit != "" {
				fmt.Fprintf(a.out, " (%.12s)", v.Commit)
			}
			fmt.Fprintf(a.out, ", %s, %s/%s\n", v.Go, v.OS, v.Arch)
			return nil
		},
	}
}

type versionView struct {
	Version    string `json:"version"`
	Commit     string `json:"commit"`
	Modified   bool   `json:"modified"`
	Go         string `json:"go"`
	OS         string `json:"os"`
	Arch       string `json:"arch"`
	JSONSchema int    `json:"json_schema"`
}

// buildVersion is what the Go toolchain wrote into the program.
func buildVersion() versionView {
	v := versionView{Version: "devel", Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH, JSONSchema: jsonSchema}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if info.Main.Version != "" && info.Main.Version != "(devel)" {
		v.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}
