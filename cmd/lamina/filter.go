package main

import (
	"fmt"
	"time"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

const filterHelp = `Filters are containerd's: FIELD==VALUE, FIELD!=VALUE, FIELD~=REGEXP, or FIELD
alone for "is set"; a comma means and, several --filter mean or. The fields are
id, state, op, type, key, cache (the id of a cache directory), description,
retained (true or false) and labels.NAME, or labels."NAME" if the name has other
characters than letters.
Ranges with <, <=, >, >=, == and != compare size ("size>100MB"), age, idle (since
its last use) and cost ("idle>=7d"), uses, and numbers in labels.`

// parseFilter makes the predicate of --filter flags, any of which has to
// match. No flags match everything.
func parseFilter(texts []string) (func(*cache.Record) bool, error) {
	f, err := policy.ParseFilters(texts...)
	if err != nil {
		return nil, fmt.Errorf("--filter: %w", err)
	}
	now := time.Now()
	return func(rec *cache.Record) bool {
		r := cache.PolicyRecord(rec)
		return f.Match(&r, now)
	}, nil
}
