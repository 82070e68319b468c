package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
)

// recordView is a record as show and ls print it in JSON. Fields are only
// ever added.
type recordView struct {
	ID          string            `json:"id"`
	State       string            `json:"state"`
	Op          string            `json:"op"`
	Type        string            `json:"type"`
	Description string            `json:"description"`
	Labels      map[string]string `json:"labels"`
	Key         string            `json:"key"`
	Parents     []cache.ID        `json:"parents"`
	Children    []cache.ID        `json:"children"`
	Aliases     []cache.ID        `json:"aliases"`
	Size        *int64            `json:"size"`
	Created     *string           `json:"created"`
	LastUsed    *string           `json:"last_used"`
	UsageCount  uint64            `json:"usage_count"`
	CostMS      int64             `json:"cost_ms"`
	Retained    bool              `json:"retained"`
	Interrupted bool              `json:"interrupted"`
	Driver      string            `json:"driver"`
	DriverKey   string            `json:"driver_key"`
	ChainID     string            `json:"chain_id"`
	DiffID      string            `json:"diff_id"`
	Verified    bool              `json:"verified"`
	Blobs       []blobView        `json:"blobs"`
	Indexes     []string          `json:"indexes"`
	Values      map[string]string `json:"values"`
	Attachments map[string]string `json:"attachments"`
	ImageRefs   []string          `json:"image_refs"`
	Holders     []holderView      `json:"holders"`
	Durable     bool              `json:"durable"`
}

type blobView struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"media_type"`
	Size      int64         `json:"size"`
	DiffID    digest.Digest `json:"diff_id"`
	Present   bool          `json:"present"`
	Claimed   bool          `json:"claimed"`
}

type holderView struct {
	PID     int     `json:"pid"`
	Command string  `json:"command"`
	Since   *string `json:"since"`
}

// view gathers what is known of a record.
func view(ctx context.Context, m *cache.Manager, rec *cache.Record) (*recordView, error) {
	children, err := m.Children(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	v := &recordView{
		ID: string(rec.ID), State: rec.State.String(), Op: rec.Op.String(), Type: rec.Type,
		Description: rec.Description, Labels: rec.Labels, Key: keyOf(rec),
		Parents: list(rec.Parents), Children: list(children), Aliases: list(rec.Aliases),
		Created: jsonTime(rec.Created), LastUsed: jsonTime(rec.LastUsed), UsageCount: rec.UsageCount,
		CostMS: rec.Cost.Milliseconds(), Retained: rec.Retain, Interrupted: rec.Interrupted,
		Driver: m.Driver().Name, DriverKey: rec.Key,
		ChainID: string(rec.ChainID), DiffID: string(rec.DiffID), Verified: rec.Verified,
		Blobs: []blobView{}, Indexes: indexes(rec), Values: map[string]string{}, Attachments: map[string]string{},
		ImageRefs: list(rec.ImageRefs), Holders: []holderView{}, Durable: rec.Durable,
	}
	if v.Labels == nil {
		v.Labels = map[string]string{}
	}
	if rec.Size != metadata.SizeUnknown {
		v.Size = &rec.Size
	}
	for _, b := range rec.Blobs {
		v.Blobs = append(v.Blobs, blobView{b.Digest, b.MediaType, b.Size, b.DiffID, hasBlob(m.Root(), b.Digest), b.Claimed})
	}
	for _, value := range rec.Values {
		v.Values[value.Name] = printable(value.Data)
	}
	for _, h := range m.Refs(rec.ID) {
		v.Holders = append(v.Holders, holderView{h.PID, h.Command, jsonTime(h.Since)})
	}
	v.Attachments, err = attachments(ctx, m, rec.ID)
	return v, err
}

// attachments are the names and digests of what is attached to a record. One
// that is damaged has no digest.
func attachments(ctx context.Context, m *cache.Manager, id cache.ID) (map[string]string, error) {
	names, err := m.Attachments(ctx, id)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, name := range names {
		data, err := m.Attachment(ctx, id, name)
		switch {
		case err == nil:
			sum := sha256.Sum256(data)
			out[name] = hex.EncodeToString(sum[:])
		case errors.Is(err, errdefs.ErrDataLoss):
			out[name] = ""
		default:
			return nil, err
		}
	}
	return out, nil
}

// indexes are the keys that a record is found by, sorted, each once.
func indexes(rec *cache.Record) []string {
	out := []string{}
	for _, v := range rec.Values {
		if v.Index != "" {
			out = append(out, v.Index)
		}
	}
	if rec.ChainID != "" {
		out = append(out, "chainid:"+string(rec.ChainID))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// printable is data as it is where that is text, else in base 64.
func printable(data []byte) string {
	if utf8.Valid(data) {
		return string(data)
	}
	return "base64:" + base64.StdEncoding.EncodeToString(data)
}

// hasBlob says whether a blob is in the content store of root.
func hasBlob(root string, d digest.Digest) bool {
	if d.Validate() != nil {
		return false
	}
	_, err := os.Stat(filepath.Join(root, "content", "blobs", d.Algorithm().String(), d.Encoded()))
	return err == nil
}

// list is s, but an empty list in JSON, not null.
func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// stateView is what the plumbing prints of the record that it worked on.
type stateView struct {
	ID         cache.ID   `json:"id"`
	PreviousID cache.ID   `json:"previous_id,omitempty"`
	State      string     `json:"state"`
	Parents    []cache.ID `json:"parents"`
}

// stateOf describes a record; previous is its former id, if that changed.
func stateOf(rec *cache.Record, previous cache.ID) stateView {
	v := stateView{ID: rec.ID, State: rec.State.String(), Parents: list(rec.Parents)}
	if previous != rec.ID {
		v.PreviousID = previous
	}
	return v
}

// printState prints the outcome of a plumbing verb: its id for people and
// shells, all of it for programs.
func (a *app) printState(v stateView) error {
	if a.json {
		return printJSON(a.out, v)
	}
	return printLine(a.out, string(v.ID))
}
