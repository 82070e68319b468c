package metadata_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

// childEnv makes the test binary a process that writes to a store until it
// is killed.
const childEnv = "LAMINA_METADATA_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := child(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// child acknowledges on its standard output what it has written.
func child(path string) error {
	ctx := context.Background()
	s, err := metadata.Open(ctx, path, metadata.Options{Command: "the child\x1b", FlushInterval: time.Millisecond})
	if err != nil {
		return err
	}
	fmt.Println("open")
	var last metadata.ID
	for i := 0; ; i++ {
		id := s.NewID()
		err := s.Update(ctx, func(tx *metadata.Tx) error {
			if last != "" && i%3 == 0 {
				return tx.Replace(last, rec(id, indexed("i"), func(r *metadata.Record) { r.Key = "key-" + string(last) }))
			}
			if err := tx.Create(rec(id, indexed("i"))); err != nil {
				return err
			}
			return tx.SetAttachment(id, "a", []byte(id))
		})
		if err != nil {
			return err
		}
		s.Touch(id, time.Now())
		if last != "" && i%3 == 0 {
			fmt.Println("-" + last)
		}
		fmt.Println("+" + id)
		last = id
		if i%3 == 0 {
			last = ""
		}
	}
}

func startChild(t *testing.T, path string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	lines := bufio.NewScanner(out)
	require.True(t, lines.Scan())
	require.Equal(t, "open", lines.Text())
	return cmd, lines
}

func TestKill(t *testing.T) {
	path := storePath(t)
	have := map[metadata.ID]bool{}
	for round := range 6 {
		cmd, lines := startChild(t, path)
		for n := 0; n < 20+17*round && lines.Scan(); n++ {
			have[metadata.ID(lines.Text()[1:])] = lines.Text()[0] == '+'
		}
		require.NoError(t, cmd.Process.Kill())
		for lines.Scan() { // acknowledged before the kill, read after it
			if len(lines.Text()) == 27 {
				have[metadata.ID(lines.Text()[1:])] = lines.Text()[0] == '+'
			}
		}
		require.Error(t, cmd.Wait())

		s := open(t, path, metadata.Options{})
		require.Empty(t, findings(t, s))
		view(t, s, func(tx *metadata.Tx) {
			// One update may have been written and not acknowledged; it
			// removes at most one record.
			missing := 0
			for id, alive := range have {
				_, err := tx.Get(id)
				if alive && errdefs.IsNotFound(err) {
					missing++
					delete(have, id)
					continue
				}
				require.Equal(t, alive, err == nil, "%s: %v", id, err)
			}
			require.LessOrEqual(t, missing, 1)
		})
		require.Greater(t, len(have), 10)
		require.NoError(t, s.Close())
	}
}
