package checksum

import "github.com/lamina-build/lamina/cache"

// Holds says whether the tree of a record is in memory.
func (k *Keeper) Holds(id cache.ID) bool { return k.inMemory(id) != nil }
