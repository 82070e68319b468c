package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// rig is a test that says what it counted, itself or by what it calls.
type rig struct{ dir, test string }

// name is what the table calls it.
func (r rig) name() string { return path.Base(r.dir) + "." + r.test }

// findRigs reads the sources below root, and finds the tests that reach a line
// "rig: " by calls that can be seen.
func findRigs(root string) ([]rig, error) {
	calls := map[string]map[string]bool{} // from a function to those that it calls
	tests := map[string]rig{}
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() == "hack" || strings.HasPrefix(d.Name(), ".") && file != root):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(file, ".go"):
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(file))
		if err != nil {
			return err
		}
		pkg := strings.TrimSuffix(parsed.Name.Name, "_test")
		for _, decl := range parsed.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || f.Body == nil {
				continue
			}
			from := pkg + "." + f.Name.Name
			if f.Recv != nil {
				from = pkg + ".()." + f.Name.Name
			} else if strings.HasPrefix(f.Name.Name, "Test") && strings.HasSuffix(file, "_test.go") {
				// Tests of one name in several packages are told apart.
				from = dir + " " + f.Name.Name
				tests[from] = rig{filepath.ToSlash(dir), f.Name.Name}
			}
			if calls[from] == nil {
				calls[from] = map[string]bool{}
			}
			addCalls(calls[from], pkg, f.Body)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var out []rig
	for _, from := range slices.Sorted(maps.Keys(tests)) {
		if reaches(calls, from, map[string]bool{}) {
			out = append(out, tests[from])
		}
	}
	return out, nil
}

// says is what a function calls that says what it counted.
const says = "a line of counts"

func addCalls(to map[string]bool, pkg string, body ast.Node) {
	ast.Inspect(body, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch f := call.Fun.(type) {
		case *ast.Ident:
			to[pkg+"."+f.Name] = true
		case *ast.SelectorExpr:
			if text, ok := firstText(call); ok && f.Sel.Name == "Logf" && strings.HasPrefix(text, `"rig: `) {
				to[says] = true
			}
			to[pkg+".()."+f.Sel.Name] = true
			if x, ok := f.X.(*ast.Ident); ok {
				to[x.Name+"."+f.Sel.Name] = true
			}
		}
		return true
	})
}

func firstText(call *ast.CallExpr) (string, bool) {
	if len(call.Args) == 0 {
		return "", false
	}
	lit, ok := call.Args[0].(*ast.BasicLit)
	if !ok {
		return "", false
	}
	return lit.Value, true
}

func reaches(calls map[string]map[string]bool, from string, seen map[string]bool) bool {
	if from == says {
		return true
	}
	if seen[from] {
		return false
	}
	seen[from] = true
	for to := range calls[from] {
		if reaches(calls, to, seen) {
			return true
		}
	}
	return false
}

var rowName = regexp.MustCompile("(?m)^\\| `([a-z]+\\.Test[^`/]*)")

// stale compares the table of a page with the rigs that there are.
func stale(file string, rigs []rig) (missing, gone []string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	_, rest, _ := strings.Cut(string(text), "<!-- counts:")
	table, _, there := strings.Cut(rest, "<!-- end of counts -->")
	if !there {
		return nil, nil, fmt.Errorf("%s has no table of counts", file)
	}
	rows := map[string]bool{}
	for _, m := range rowName.FindAllStringSubmatch(table, -1) {
		rows[m[1]] = true
	}
	for _, r := range rigs {
		if !rows[r.name()] {
			missing = append(missing, r.name())
		}
		delete(rows, r.name())
	}
	return missing, slices.Sorted(maps.Keys(rows)), nil
}
