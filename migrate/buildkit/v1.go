package buildkit

import (
	"encoding/json"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// gcRoot is the label that kept things up to v0.6, before there were leases.
const gcRoot = "containerd.io/gc.root"

// upgradeV1 says of rows up to v0.6 what later ones say themselves, as v0.7
// did when it migrated them: what is immutable, and what lies on what, is
// taken from the snapshotter; the blob from the mapping of then.
func (s *State) upgradeV1() {
	for _, r := range s.List {
		s.v1Blob(r)
		if r.EqualMutable != "" {
			r.Committed = true
			continue
		}
		snap := s.Snapshots[r.ID]
		if snap == nil {
			continue
		}
		r.Committed = snap.Kind == Committed
		if snap.Below != nil {
			r.Parent = snap.Below.Name
		}
	}
	for _, r := range s.List { // one may lend what it was lent
		if m := s.Rows[r.EqualMutable]; m != nil && r.Parent == "" {
			r.Parent = m.Parent
		}
	}
	chains := map[string]*chain{}
	for _, r := range s.List {
		s.v1Chain(r, chains)
	}
	for name, snap := range s.Snapshots {
		if _, ok := snap.Labels[gcRoot]; ok {
			s.Leases[name] = &Lease{ID: name, Snapshots: []string{name}}
		}
	}
}

// v1Blob reads the mapping from a snapshot to its blob.
func (s *State) v1Blob(r *Row) {
	for _, v := range r.Values {
		if v.Name != "blobmapping.blob" {
			continue
		}
		var pair struct {
			Blobsum, DiffID digest.Digest
		}
		if err := json.Unmarshal(v.JSON, &pair); err != nil || pair.Blobsum.Validate() != nil || pair.DiffID.Validate() != nil {
			continue
		}
		if s.Blobs[pair.Blobsum] == nil {
			continue // it was collected
		}
		r.Blob, r.DiffID = pair.Blobsum, pair.DiffID
		r.MediaType = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	}
}

// chain is what a layer and those below it are called.
type chain struct{ chainID, blobChainID digest.Digest }

// v1Chain computes the chain ids of a row. A layer on one without a blob has
// none.
func (s *State) v1Chain(top *Row, chains map[string]*chain) {
	var path []*Row
	for r := top; r != nil && chains[r.ID] == nil; r = s.Rows[r.Parent] {
		chains[r.ID] = &chain{} // also ends a circle
		path = append(path, r)
	}
	for i := len(path) - 1; i >= 0; i-- {
		r := path[i]
		if r.Blob == "" || r.ChainID != "" {
			continue
		}
		c := chain{r.DiffID, identity.ChainID([]digest.Digest{r.Blob, r.DiffID})}
		if r.Parent != "" {
			below := chains[r.Parent]
			if below == nil || below.chainID == "" {
				continue
			}
			c.chainID = identity.ChainID([]digest.Digest{below.chainID, c.chainID})
			c.blobChainID = identity.ChainID([]digest.Digest{below.blobChainID, c.blobChainID})
		}
		*chains[r.ID] = c
		r.ChainID = c.chainID
		text, _ := json.Marshal(c.blobChainID) // a string
		r.Values = append(r.Values, Value{Name: "cache.blobChainID", JSON: text, Index: "blobchainid:" + string(c.blobChainID)})
	}
}
