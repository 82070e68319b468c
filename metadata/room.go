package metadata

import (
	"errors"
	"fmt"
	"os"

	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// A disk that is full must let records go, which writes pages, too. So the
// file is kept longer than it needs to be, with blocks of its own, and a
// transaction that makes the store grow leaves a reserve that others may use.
// Growing ahead costs no sync: the first sync of the transaction that comes
// next takes the new length along, before any page behind it is counted on.
const (
	// reserveLeast and reserveMost bound the reserve, in pages: a quarter of
	// the file, within these. A removal rewrites a path of three or four
	// pages in each of up to eight buckets, and the list of free pages; one
	// of many records at once rewrites more, but never more than there is.
	reserveLeast, reserveMost = 40, 256
	// reserveSlack is what a small transaction is thought to need itself.
	reserveSlack = 32
	// smallPut is what a transaction may write, in bytes, and still count as
	// one that does not make the store grow, if it creates nothing: records
	// that are rewritten mostly keep their size.
	smallPut = 64 << 10
	// growLeast and growStep bound by how much the file grows, in bytes: an
	// eighth of it, within these.
	growLeast = 128 << 10
	growStep  = 1 << 20
)

// writeInPlace has a file system that copies on write, btrfs, write the file in
// place, which must be empty yet: on a full disk the blocks that it has would
// otherwise be of no use. What is in it has sums of its own. Other file systems
// write in place, or say that they cannot.
func writeInPlace(f *os.File) {
	const noCopyOnWrite = 0x00800000 // FS_NOCOW_FL
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil && flags&noCopyOnWrite == 0 {
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|noCopyOnWrite))
	}
}

// room is what is known of the file's blocks behind the last page in use.
type room struct {
	generation uint64
	known      bool
	end        int64 // up to here the file has blocks
	never      bool  // the file system cannot reserve
}

// makeRoom sees to it that the transaction finds its pages, and leaves the
// reserve if it makes the store grow.
func (s *Store) makeRoom(tx *Tx) error {
	if s.room.never && s.opts.MaxSize <= 0 {
		return nil
	}
	h, r := tx.handle, &s.room
	size := int64(h.pageSize)
	st := h.db.Stats()
	free := int64(st.FreePageN)
	if st.OpenTxN == 0 {
		free += int64(st.PendingPageN)
	}
	used := int64(tx.tree.used)
	need := reserve(used) + reserveSlack + 2*tx.putBytes/size + (free+int64(st.PendingPageN))*8/size
	if err := r.look(h, used*size); err != nil {
		return ioError("make room", err)
	}
	behind := r.end/size - used
	if free+behind >= need && behind*size >= 2*tx.largest {
		return nil
	}
	grown := used + need + min(max(used/8, growLeast/size), growStep/size)
	err := r.grow(h, used*size, grown*size, int64(s.opts.MaxSize))
	if err == nil || r.never {
		return nil
	}
	if !outOfSpace(err) {
		return ioError("make room", err)
	}
	// A step less may still fit.
	if r.grow(h, used*size, (used+need)*size, int64(s.opts.MaxSize)) == nil {
		return nil
	}
	if !tx.grows() || free+r.end/size-used >= need {
		return nil
	}
	return ioError("make room", err)
}

// grows says whether the transaction makes the store larger.
func (tx *Tx) grows() bool { return tx.creates || tx.putBytes > smallPut }

// look finds out what a file has, once. One whose length is not backed by
// blocks counts as ending at its last page in use.
func (r *room) look(h *handle, used int64) error {
	if r.known && r.generation == h.generation {
		r.end = max(r.end, used)
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(h.file.Fd()), &st); err != nil {
		return err
	}
	r.known, r.generation, r.end = true, h.generation, used
	if st.Blocks*512 >= st.Size {
		r.end = max(used, st.Size)
	}
	return nil
}

// grow gives the file blocks up to end.
func (r *room) grow(h *handle, used, end, most int64) error {
	if most > 0 && end > most {
		return berrors.ErrMaxSizeReached
	}
	if r.never || end <= r.end {
		return nil
	}
	for {
		err := unix.Fallocate(int(h.file.Fd()), 0, used, end-used)
		switch {
		case err == nil:
			r.end = end
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			r.never = true
			return nil
		}
		return fmt.Errorf("grow the file: %w", err)
	}
}

// trim gives back what was grown ahead for a large transaction, and leaves
// what the next small one needs. It is called by Close.
func (s *Store) trim() {
	h := s.now.Load()
	info, err := h.file.Stat()
	if err != nil || s.opts.MaxSize > 0 {
		return
	}
	used := h.usedPages()
	keep := (used+reserve(used)+reserveSlack)*h.pageSize + growLeast
	if used > 0 && info.Size() >= keep+growLeast {
		_ = h.file.Truncate(keep) // a file that stays longer harms nobody
	}
}

// reserve is the number of pages that removals find on a full disk.
func reserve(used int64) int64 { return min(max(used/4, reserveLeast), reserveMost) }
