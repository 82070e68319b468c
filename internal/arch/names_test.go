package arch

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// forbidden is what must not stand in a tracked file: what only means
// something on the machine, or in the office, of one who works on the
// project. Each pattern is written so that it does not match itself.
var forbidden = []struct {
	pattern *regexp.Regexp
	why     string
}{
	{regexp.MustCompile(`/wor[k]/(main|shared|\.library)`), "a path of one machine"},
	{regexp.MustCompile(`/tm[p]/(brief|bash_jobs)`), "a path of one machine"},
	{regexp.MustCompile(`/(hom[e]|User[s])/[a-z]+/(src|go|git|projects)/`), "a path of one machine"},
	{regexp.MustCompile(`(proxy|sum)\.golan[g]`), "a registry's host: people have mirrors"},
	{regexp.MustCompile(`\bfar[m]-[a-z]`), "a tool of one workplace"},
	{regexp.MustCompile(`\bissue[s] show\b`), "a tool of one workplace"},
	{regexp.MustCompile(`(?i)\bissu[e] #?[0-9]{1,2}\b`), "a number that says nothing to a reader: give the reason"},
	{regexp.MustCompile(`(?i)\b(cl[a]ude|chat ?g[p]t|copilo[t]|anthropi[c]|opena[i])\b`), "who typed it does not matter"},
	{regexp.MustCompile(`(?i)\b(sub-?agen[t]|(as an|by an) A[I] )`), "who typed it does not matter"},
	{regexp.MustCompile(`\b(DESIG[N]|OVERLA[Y]|PEE[R]|LEGAC[Y]|STYL[E]|DEPEND[E]NCIES|REGRESSION[S]|COMMO[N])\.md\b`), "a document that is not in the repository"},
	{regexp.MustCompile(`(?m)^(<{7}|>{7})( |$)`), "a merge that was not finished"},
	{regexp.MustCompile(`-----BEGI[N] [A-Z ]*PRIVATE KEY`), "a secret"},
}

// TestNames looks for forbidden text in all tracked files and their names.
func TestNames(t *testing.T) {
	root := moduleRoot(t)
	files := tracked(t, root)
	for _, name := range files {
		for _, hit := range scan(name, []byte(name)) {
			t.Error(hit)
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // removed in the working tree, not yet in the index
		}
		require.NoError(t, err)
		if bytes.IndexByte(text, 0) >= 0 {
			continue // not a text: archives and databases of tests
		}
		for _, hit := range scan(name, text) {
			t.Error(hit)
		}
	}
}

// TestNamesFindsThem gives each pattern something to find, put together here
// so that this file stays clean itself.
func TestNamesFindsThem(t *testing.T) {
	dirty := []string{
		"see /wor" + "k/main/cache",
		"cat /tm" + "p/brief",
		"/hom" + "e/ann/src/lamina",
		"GOPROXY=https://proxy.golan" + "g.org",
		"far" + "m-run",
		"issue" + "s show 4",
		"as Issu" + "e 12 says",
		"written by Cl" + "aude",
		"a sub" + "agent",
		"section 4 of DESIG" + "N.md",
		"a\n<<<<<<" + "< HEAD\n",
		"-----BEGI" + "N RSA PRIVATE KEY",
	}
	require.Len(t, dirty, len(forbidden))
	for i, text := range dirty {
		require.Truef(t, forbidden[i].pattern.MatchString(text), "%s in %q", forbidden[i].pattern, text)
		require.NotEmpty(t, scan("f", []byte(text)))
	}
	for _, text := range []string{
		"active/a-w/work/work/incompat/volatile",
		"BuildKit's pull request 2223",
		"opencontainers/image-spec issue 1234",
		"docs/design.md",
		"a helper process in a session of its own",
	} {
		require.Empty(t, scan("f", []byte(text)))
	}
}

// scan returns a line for people for each match in text.
func scan(name string, text []byte) []string {
	var hits []string
	for _, f := range forbidden {
		for _, at := range f.pattern.FindAllIndex(text, -1) {
			line := 1 + bytes.Count(text[:at[0]], []byte("\n"))
			hits = append(hits, fmt.Sprintf("%s:%d: %q: %s", name, line, text[at[0]:at[1]], f.why))
		}
	}
	return hits
}

// tracked lists the files that git knows, relative to root.
func tracked(t *testing.T, root string) []string {
	t.Helper()
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		t.Skipf("not a git checkout, nothing says which files belong to the project: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), "git", "-c", "safe.directory="+root, "ls-files", "-z")
	cmd.Dir = root
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err)
	files := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	require.Contains(t, files, "go.mod")
	return files
}
