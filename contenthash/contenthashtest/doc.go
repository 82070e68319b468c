// Package contenthashtest makes random trees of files, and questions about
// them, from a number: the same on every machine. Tests use it to compare the
// digests of package contenthash with recorded ones and with those of BuildKit.
package contenthashtest
