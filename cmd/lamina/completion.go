package main

import "github.com/spf13/cobra"

func newCompletion(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a script that completes commands, flags and ids",
		Example: `  source <(lamina completion bash)
  lamina completion zsh > "${fpath[1]}/_lamina"
  lamina completion fish > ~/.config/fish/completions/lamina.fish`,
		Long: `Print a script that teaches a shell to complete lamina's commands and flags, and
the ids and keys that are in the store at that moment. It needs no store.`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []cobra.Completion{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.out, true)
			case "zsh":
				return root.GenZshCompletion(a.out)
			}
			return root.GenFishCompletion(a.out, true)
		},
	}
}
