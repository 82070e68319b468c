// Package bench measures what the operations of a cache cost.
//
// One Subject stands for each cache under measurement. Each round runs one
// sample of an operation on every subject in turn, the order rotating, so that
// a slow minute of the machine hits all of them; the figures are medians.
// Counts of write transactions stand beside the times: they are the same on
// any machine.
package bench
