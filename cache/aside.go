package cache

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// asideNice is by how much less urgent the removal of a prune is than the calls
// beside it. Two threads that the kernel puts on one processor take turns of
// some milliseconds each, also while another processor is idle, and a New that
// met a removal there waited for such a turn. On two processors, beside a prune
// of 10,000 records, the 99th percentile of New was 3.5 and 4.5 times that of
// the idle store, and with 5, in turns, 2.2 and 2.9. More costs too much where
// other programs use all processors: a prune that was as a whole less urgent
// took 2.4 times as long with 5 and 5.9 times with 10, and a removal that waits
// for its turn may have the lock of a directory in the kernel meanwhile.
const asideNice = 5

// aside runs f in a thread of its own, which leaves the processors to others as
// far as it can, and waits for it. It suits what makes system calls without
// end. Others wait for whatever f holds, so that should be nothing that they
// need.
func aside(f func()) {
	var end func()
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked, so the thread ends with the goroutine: without
		// privileges nobody may make it more urgent again.
		runtime.LockOSThread()
		// On Linux a priority is a thread's, and asking gives 20 less the nice
		// value. Without it f is as good as before.
		if urgency, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 20-urgency+asideNice)
		}
		end = runtime.Goexit
		defer func() {
			if p := recover(); p != nil {
				end = func() { panic(p) }
			}
		}()
		f()
		end = nil
	}()
	<-done
	// A panic and the end of the goroutine are the caller's.
	if end != nil {
		end()
	}
}
