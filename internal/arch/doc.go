// Package arch holds the project's rules about itself, which its tests check:
// who may import whom, and what must not stand in a tracked file.
//
// The rooms, top down. Imports point downwards only, and rooms that stand
// side by side do not know each other:
//
//	cmd/lamina
//	workspace, migrate
//	checksum
//	cache
//	snapshot, metadata, contenthash, layer, image
//
// integration and hack stand outside: they may import what they like, and
// nobody imports them.
package arch
