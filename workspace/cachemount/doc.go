// Package cachemount gives builds directories that outlive them: a compiler's
// cache, downloaded modules, what a tool keeps to be faster next time.
//
// Such a directory is found by an id, and is a record of the cache of type
// exec.cachemount: it counts as usage, can be pruned, and is used in place, by
// whoever mounts it, never copied. What is in it is no input and no output of
// a build.
//
// How several builds share one id is their own choice:
//
//	shared   all at once in one directory; the tools take care themselves
//	private  one at a time; who finds it in use gets a directory of its own
//	locked   one at a time; the others wait
//
// Who has to wait waits in the order of arrival, across processes. The queue
// is a file whose bytes are locked: each who comes draws a number and locks the
// byte of that number, and it is his turn when no byte before it is locked. The
// kernel unlocks what a dead process had, so nobody waits for the dead.
package cachemount
