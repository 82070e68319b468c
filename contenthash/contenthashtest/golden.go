package contenthashtest

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Answer is the text of an answer: the digest, or "!" for an error of any
// kind, which the two sides word differently.
func Answer(d digest.Digest, err error) string {
	if err != nil {
		return "!"
	}
	return string(d)
}

// GoldenLine is what is recorded of the answers to the questions of one seed:
// the beginning of the first, that of the root, and of a hash over all.
func GoldenLine(answers []string) string {
	root := strings.TrimPrefix(answers[0], "sha256:")
	all := sha256.Sum256([]byte(strings.Join(answers, "\n")))
	return fmt.Sprintf("%.12s %x", root, all[:6])
}

// WriteGolden records the lines of consecutive seeds.
func WriteGolden(file string, first uint64, lines []string) error {
	text := fmt.Sprintf("# The peer's answers for the seeds from %d, see GoldenLine. Written by hack/peer/contenthash.\n", first)
	return os.WriteFile(file, []byte(text+strings.Join(lines, "\n")+"\n"), 0o644)
}

// ReadGolden reads the lines of the seeds from 1.
func ReadGolden(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	for s := bufio.NewScanner(f); s.Scan(); {
		if !strings.HasPrefix(s.Text(), "#") {
			lines = append(lines, s.Text())
		}
	}
	return lines, nil
}
