// Package runlog keeps what a command printed: which bytes came on standard
// output and which on standard error, in what order, and when.
//
// A log is
//
//	"LRUN"               magic
//	1                    version of what follows, one byte
//	uvarint              bytes of output in the log
//	uvarint              bytes of output that were dropped at its end, since
//	                     the log had become too long
//	zstd stream of       chunks, in the order in which they were written:
//	    1 or 2           stdout or stderr, one byte
//	    uvarint          microseconds since the chunk before
//	    uvarint          length, 1 to 64 KiB
//	    ...              so many bytes
//
// The zstd stream ends with a checksum, so a log that was cut or changed is
// noticed. Reading one takes a few megabytes of memory whatever it says about
// itself.
package runlog

// Attachment is the name under which a record carries its log.
const Attachment = "log"
