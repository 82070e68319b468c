// Package sandbox runs a command so that nothing of it outlives the process
// that asked for it: no process, whatever it did to get away, and no mount.
//
// There are two halves. [Enter] puts the whole program into a mount namespace
// that ends with it, so that what it mounts is seen by nobody else and needs
// no cleaning up. [Run] starts a command below an init process that is PID 1
// of a new PID namespace:
//
//	lamina ── own mount namespace (Enter); for an ordinary user
//	  │       also an own user namespace, below a process that
//	  │       only passes signals and the exit status on
//	  └─ init ── PID 1, own PID and mount namespace, own /proc
//	       └─ command ── own session; for an ordinary user without
//	            └─ ...   any capability, the user id unchanged
//
// When PID 1 ends the kernel kills every process of its namespace, and with
// the last of them the mount namespace goes. Init ends when the command has
// ended, when its connection to lamina breaks, and by the kernel's
// parent-death signal; so it is enough that lamina ends, even by SIGKILL.
// Descendants then die soon, not at once: whoever needs the directory for
// itself afterwards has to ask the kernel whether it is still in use.
//
// Where the kernel allows no namespaces the same init process is a subreaper
// instead: all descendants become its children when their parents end, and it
// kills them all before it ends itself. This holds as long as nobody kills
// that process, too, and as long as the command does not change its user.
//
// The sandbox keeps commands from leaving things behind. It is no security
// boundary: a command sees the file system and the network of its user.
//
// A program that uses Run calls [Init] first thing in main (a test binary in
// TestMain), since init is the program itself, started again.
package sandbox
