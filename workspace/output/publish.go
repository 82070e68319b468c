package output

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// publishTries bounds how often a destination may appear or vanish under us.
const publishTries = 10

// publish renames all copies to their destinations. On an error those that
// were renamed go back.
func (c *collector) publish() error {
	for i, j := range c.jobs {
		if j.same {
			continue
		}
		if err := j.publish(); err != nil {
			errs := []error{err}
			for k := i - 1; k >= 0; k-- {
				errs = append(errs, c.jobs[k].takeBack())
			}
			return errors.Join(errs...)
		}
	}
	return nil
}

func (j *job) publish() error {
	at := j.parent.Fd()
	for range publishTries {
		var st unix.Stat_t
		err := fsat.Lstat(at, j.base, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
			err = unix.Renameat2(at, j.temp, at, j.base, unix.RENAME_NOREPLACE)
			if errors.Is(err, unix.EEXIST) {
				continue
			}
			if notKnown(err) {
				err = unix.Renameat(at, j.temp, at, j.base)
			}
			j.done = err == nil
			return j.fail("rename to destination", err)
		case err != nil:
			return j.fail("stat destination", err)
		}
		if err := j.checkType(&st); err != nil {
			return err
		}
		err = unix.Renameat2(at, j.temp, at, j.base, unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if notKnown(err) {
			return j.publishWithoutExchange()
		}
		j.done, j.replaced = err == nil, err == nil
		return j.fail("rename to destination", err)
	}
	return j.fail("rename to destination", unix.EBUSY)
}

// notKnown tells that a file system has no such kind of rename.
func notKnown(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP)
}

// publishWithoutExchange serves file systems that cannot exchange names, such
// as NFS. A file is still replaced by one rename; a directory is away for a
// moment.
func (j *job) publishWithoutExchange() error {
	at, old := j.parent.Fd(), fsat.TempName()
	if !j.isDir() {
		// A second name keeps the old file for takeBack, where links exist.
		linked := unix.Linkat(at, j.base, at, old, 0) == nil
		if err := unix.Renameat(at, j.temp, at, j.base); err != nil {
			if linked {
				err = errors.Join(err, unix.Unlinkat(at, old, 0))
			}
			return j.fail("rename to destination", err)
		}
		j.done, j.replaced, j.final = true, linked, !linked
		if linked {
			j.temp = old
		}
		return nil
	}
	if err := unix.Renameat(at, j.base, at, old); err != nil {
		return j.fail("rename away destination", err)
	}
	if err := unix.Renameat(at, j.temp, at, j.base); err != nil {
		return errors.Join(j.fail("rename to destination", err),
			j.fail("rename back destination", unix.Renameat(at, old, at, j.base)))
	}
	j.temp, j.done, j.replaced = old, true, true
	return nil
}

// takeBack undoes publish.
func (j *job) takeBack() error {
	if !j.done || j.final {
		return nil
	}
	at := j.parent.Fd()
	var err error
	switch {
	case j.replaced:
		err = unix.Renameat2(at, j.temp, at, j.base, unix.RENAME_EXCHANGE)
		if notKnown(err) {
			next := fsat.TempName()
			if err = unix.Renameat(at, j.base, at, next); err == nil {
				if err = unix.Renameat(at, j.temp, at, j.base); err == nil {
					j.temp = next
				}
			}
		}
	default:
		err = unix.Renameat(at, j.base, at, j.temp)
	}
	if err != nil {
		j.temp = "" // whatever it holds by now is not ours to remove
		return j.fail("rename back destination", err)
	}
	j.done, j.replaced = false, false
	return nil
}

// clean removes what is left beside the destinations: copies that did not make
// it, or what they replaced. After a failure the directories that were made
// for destinations go, too.
func (c *collector) clean(failed bool) error {
	var errs []error
	for _, j := range c.jobs {
		if j.temp == "" || j.done && !j.replaced {
			continue
		}
		errs = append(errs, j.fail("remove what is left beside the destination", fsat.RemoveAll(j.parent.Fd(), j.temp)))
	}
	for i := len(c.made) - 1; i >= 0 && failed; i-- {
		// Somebody else may use it by now.
		if err := unix.Rmdir(c.made[i]); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fsat.Error("remove directory", c.made[i], err))
		}
	}
	return errors.Join(errs...)
}
