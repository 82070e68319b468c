// Package contenthash computes digests of files and trees inside a snapshot,
// equal to those of BuildKit's contenthash version 0 for the same tree and
// options, and remembers what it read.
package contenthash
