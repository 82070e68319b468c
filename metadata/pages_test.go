package metadata_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

// TestKilledAndDamaged opens stores whose free pages were not stored, with
// each byte of a page's structure changed in turn. bbolt walks the pages of
// such a file in a goroutine of its own, so what gets by ends this process.
func TestKilledAndDamaged(t *testing.T) {
	if metadata.UnderRace {
		t.Skip("under the race detector bbolt's own goroutines race when it gives up on a damaged page")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "s.db")
	s := open(t, path, metadata.Options{})
	for i := range 40 {
		create(t, s, rec(metadata.ID(fmt.Sprint(i)), func(r *metadata.Record) { r.Description = strings.Repeat("x", 300) }))
	}
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	meta, err := metadata.NewestMeta(path)
	require.NoError(t, err)
	require.EqualValues(t, ^uint64(0), meta.Freelist, "the free pages are stored: the test tests nothing")

	page := os.Getpagesize()
	content = content[:int(meta.Used)*page]
	killed := filepath.Join(dir, "killed.db")
	refused, opened := 0, 0
	try := func(at int, bits byte) {
		b := append([]byte(nil), content...)
		b[at] ^= bits
		require.NoError(t, os.WriteFile(killed, b, 0o600))
		s, err := metadata.Open(t.Context(), killed, metadata.Options{FlushInterval: -1})
		if err != nil {
			require.True(t, errors.Is(err, metadata.ErrDamaged) || errors.Is(err, metadata.ErrForeign), "byte %d: %v", at, err)
			refused++
			return
		}
		opened++
		err = s.View(t.Context(), func(tx *metadata.Tx) error {
			for range tx.Check() {
				continue
			}
			return nil
		})
		if err != nil {
			require.ErrorIs(t, err, metadata.ErrDamaged)
		}
		_ = s.Close() // it may have to write to what is damaged
	}
	for at := 2 * page; at < len(content); at += page {
		for i := range 32 { // the header and an element
			try(at+i, 1)
		}
	}
	root := int(meta.Root) * page
	for i := range 300 {
		try(root+i, 0x11)
	}
	// Branches that lead back to themselves, or twice to the same page.
	branches := 0
	for at := 2 * page; at < len(content); at += page {
		if binary.NativeEndian.Uint16(content[at+8:]) != 1 {
			continue
		}
		for el := at + 16; el < at+16+16*int(binary.NativeEndian.Uint16(content[at+10:])); el += 16 {
			below := binary.NativeEndian.Uint64(content[el+8:])
			for _, to := range []uint64{uint64(at / page), meta.Root} {
				if binary.NativeEndian.Uint64(content[at:]) != uint64(at/page) {
					continue // a free page
				}
				branches++
				binary.NativeEndian.PutUint64(content[el+8:], to)
				try(el, 0)
			}
			binary.NativeEndian.PutUint64(content[el+8:], below)
		}
	}
	require.NotZero(t, branches)
	require.NotZero(t, refused)
	require.NotZero(t, opened)
	t.Logf("%d refused, %d opened", refused, opened)
}
