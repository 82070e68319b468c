package metadata

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"

	"golang.org/x/sys/unix"
)

// A seal is what Close leaves in the file: a copy of the meta page that counts
// and the checksum of the list of free pages. It lies in the other meta page,
// in a part that bbolt does not read and overwrites with its next transaction,
// so a seal never outlives the state that it is of. It tells the next Open
// that it need not look at every page:
//
//   - A meta page that was damaged later is noticed, where bbolt would go back
//     to the state before it and say nothing. It is restored from the copy.
//   - A list of free pages that was damaged later is noticed. A page in use
//     that is in there would be overwritten.
//
// A seal is not synced: one that is missing or torn costs the next Open a look
// at all pages, nothing else. It lies in another sector than the meta page,
// and that is the one that does not count.
const (
	sealAt    = 512
	sealMagic = "lamina 1"
	sealSize  = len(sealMagic) + boltMetaSize + 4 + 4
)

// seal is magic, meta page without its header, CRC-32C of the list of free
// pages, and CRC-32C of all that, in the machine's byte order as bbolt's.
type seal struct {
	meta boltMeta
	raw  []byte // the meta page that it is of
	free uint32 // 0 if free pages are not stored
}

// writeSeal seals the newest state of a file that nobody writes.
func writeSeal(f *os.File) error {
	m, err := newestMeta(f)
	if err != nil {
		return err
	}
	if have, ok := readSeal(f, m); ok && have.meta.txid == m.txid {
		return nil
	}
	free, err := freelistSum(f, m)
	if err != nil {
		return err
	}
	size := int64(m.pageSize)
	raw := make([]byte, boltMetaSize)
	if _, err := f.ReadAt(raw, int64(m.txid%2)*size+boltHeader); err != nil {
		return err
	}
	b := append([]byte(sealMagic), raw...)
	b = binary.NativeEndian.AppendUint32(b, free)
	b = binary.NativeEndian.AppendUint32(b, crc32.Checksum(b, castagnoli()))
	_, err = f.WriteAt(b, int64(1-m.txid%2)*size+sealAt)
	return err
}

// freelistSum is the checksum of the list of free pages.
func freelistSum(f *os.File, m boltMeta) (uint32, error) {
	if m.freelist == boltNoFreelist {
		return 0, nil
	}
	b, err := freelistBytes(fileSource{f}, m)
	if err != nil {
		return 0, err
	}
	return crc32.Checksum(b, castagnoli()), nil
}

// readSeal returns the seal of a file, whichever state it is of.
func readSeal(f *os.File, m boltMeta) (best seal, found bool) {
	for id := range int64(2) {
		b := make([]byte, sealSize)
		if _, err := f.ReadAt(b, id*int64(m.pageSize)+sealAt); err != nil || string(b[:len(sealMagic)]) != sealMagic {
			continue
		}
		e, end := binary.NativeEndian, sealSize-4
		if e.Uint32(b[end:]) != crc32.Checksum(b[:end], castagnoli()) {
			continue
		}
		s := seal{raw: b[len(sealMagic) : len(sealMagic)+boltMetaSize], free: e.Uint32(b[end-4:])}
		var err error
		if s.meta, err = decodeBoltMeta(s.raw); err != nil || s.meta.pageSize != m.pageSize || int64(s.meta.txid%2) == id {
			continue
		}
		if !found || s.meta.txid > best.meta.txid {
			best, found = s, true
		}
	}
	return best, found
}

// restore writes the meta page that the seal is of.
func (s seal) restore(f *os.File) error {
	e, id := binary.NativeEndian, s.meta.txid%2
	b := e.AppendUint64(nil, id)
	b = e.AppendUint16(b, pageMeta)
	b = append(b, make([]byte, boltHeader-len(b))...)
	if _, err := f.WriteAt(append(b, s.raw...), int64(id)*int64(s.meta.pageSize)); err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// newest finds the state that counts. If that is not what bbolt would find,
// damaged says so, and the seal says what it was.
func newest(f *os.File) (m boltMeta, s seal, sealed, damaged bool, err error) {
	m, err = newestMeta(f)
	if err != nil {
		return m, s, false, false, err
	}
	s, sealed = readSeal(f, m)
	switch {
	case sealed && s.meta.txid > m.txid:
		return s.meta, s, true, true, nil
	case sealed && s.meta.txid < m.txid:
		return m, s, false, false, nil
	}
	return m, s, sealed, false, nil
}

// prepare makes sure that bbolt can be let near a file in order to write. A
// file that is sealed needs a look at its free pages only; else somebody was
// killed, and every page is looked at.
func prepare(f *os.File, m boltMeta, s seal, sealed bool) error {
	if sealed {
		if sum, err := freelistSum(f, m); err != nil {
			return err
		} else if sum != s.free {
			return badPage(m.freelist, "free pages have the checksum %08x, not %08x", sum, s.free)
		}
		if m.freelist == boltNoFreelist {
			sealed = false // bbolt is going to walk all pages for the free ones
		} else if _, err := freePages(fileSource{f}, m); err != nil {
			return err
		}
	}
	if sealed {
		return nil
	}
	w, err := walkPages(fileSource{f}, m)
	if err != nil || m.freelist == boltNoFreelist {
		return err
	}
	free, err := freePages(fileSource{f}, m)
	if err != nil {
		return err
	}
	for _, id := range free {
		if w.reached[id] {
			return badPage(m.freelist, "page %d is in use and in the list of free ones", id)
		}
	}
	return nil
}

// decodeBoltMeta reads a meta page behind its header.
func decodeBoltMeta(p []byte) (boltMeta, error) {
	e := binary.NativeEndian
	if e.Uint32(p) != boltMagic {
		return boltMeta{}, errNoMeta
	}
	if e.Uint32(p[4:]) != boltVersion || e.Uint64(p[56:]) != metaSum(p) {
		return boltMeta{}, errBadMeta
	}
	return boltMeta{
		pageSize: e.Uint32(p[8:]), root: e.Uint64(p[16:]), freelist: e.Uint64(p[32:]),
		used: e.Uint64(p[40:]), txid: e.Uint64(p[48:]),
	}, nil
}

func errDamagedMeta(m boltMeta) error {
	return fmt.Errorf("meta page of transaction %d, open it to write to have it restored: %w", m.txid, ErrDamaged)
}
