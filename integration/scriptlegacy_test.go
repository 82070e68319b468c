package integration

import (
	"os"
	"path/filepath"
	"runtime"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/migrate/legacytest"
)

// legacy DIR makes the root of an old daemon, from an archive of a real one, and
// sets WORKER to the worker's directory in it. legacy lock FILE holds the lock
// of a database as a running daemon does, until the script ends.
func cmdLegacy(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 || len(args) == 2 && args[0] != "lock" {
		ts.Fatalf("usage: legacy DIR or legacy lock FILE")
	}
	if len(args) == 2 {
		f, err := os.Open(ts.MkAbs(args[1]))
		ts.Check(err)
		ts.Check(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
		ts.Defer(func() { _ = f.Close() })
		return
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	archive, worker := "v0.34.1-crash-many", "runc-overlayfs"
	if ts.Getenv("DRIVER") == "native" {
		archive, worker = "v0.34.1-native", "runc-native"
	}
	ts.Check(legacytest.Unpack(filepath.Join(here(), "..", "migrate", "testdata"), archive, dir))
	ts.Setenv("WORKER", filepath.Join(args[0], worker))
	ts.Setenv("NAME", worker)
}

// here is the directory of this file: scripts run elsewhere.
func here() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(file)
}
