package metadata_test

import (
	"os"
	"testing"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/metadata/metadatatest"
)

// The store keeps its promises in memory, or on whatever the temporary
// directory is.
func TestHistories(t *testing.T) {
	dir := "/dev/shm"
	if _, err := os.Stat(dir); err != nil {
		dir = t.TempDir()
	}
	metadatatest.Run(t, dir, func(path string, o metadata.Options) (*metadata.Store, error) {
		return metadata.Open(t.Context(), path, o)
	})
}
