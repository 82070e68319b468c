//go:build race

package metadata

// stride is how many bytes one step of a long test goes on: the race detector
// makes each of them ten times slower.
const stride = 13
