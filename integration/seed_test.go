package integration

import (
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// newSeed is what a test's random numbers come from: LAMINA_TEST_SEED, or the
// clock. It is printed.
func newSeed(t *testing.T) uint64 {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if text := os.Getenv("LAMINA_TEST_SEED"); text != "" {
		var err error
		n, err = strconv.ParseUint(text, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("LAMINA_TEST_SEED=%d", n)
	return n
}
