// Package page rewrites the parts of a documentation page that commands write.
package page

import (
	"fmt"
	"os"
	"strings"
)

// Write puts text between the marks of a block in a file, which are
// "<!-- NAME: hack/NAME writes this -->" and "<!-- end of NAME -->".
func Write(file, name, text string) error {
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := fmt.Sprintf("<!-- %s: hack/%s writes this -->\n", name, name), fmt.Sprintf("<!-- end of %s -->\n", name)
	before, rest, there := strings.Cut(string(old), begin)
	_, after, ends := strings.Cut(rest, end)
	if !there || !ends {
		return fmt.Errorf("%s has no block of %s", file, name)
	}
	return os.WriteFile(file, []byte(before+begin+text+end+after), 0o644)
}
