//go:build race

package contenthash_test

const raceEnabled = true
