// Package policy decides which records of a cache go when space is wanted.
//
// It is pure: a plan is computed from a usage snapshot, the figures of a disk,
// a list of policies and a time, and from nothing else. The same input gives
// the same plan, which can be printed, stored, tested and replayed. It knows
// plain data only, neither a store nor a driver.
//
// # How a plan is made
//
// Policies apply in the order of their list, each to what the ones before it
// left. One policy works in these steps:
//
//  1. It selects records by its filters and types.
//  2. It spares what is held, what is of a protected type (internal,
//     frontend) or named by an image unless All is set, and what was used
//     within KeepDuration. A record that nobody used yet counts from its
//     creation.
//  3. If it has limits and the store is within all of them, nothing goes.
//     Otherwise records go one by one, until the store is at the lowest
//     limit, or at Target if that is lower. Without limits all go.
//  4. No removal takes the store below Reserved: a record that is too large
//     for that is passed over.
//
// Leaves go first; a parent is considered as soon as its last child has gone,
// in the same plan. Among those that could go, the order is that of Before. It
// is total, so that two plans for one state are the same.
//
// A limit that is not given is nil. Zero is a limit like any other: a MaxUsed of
// 0 bytes lets nothing stay that may go.
//
// What the store uses, for Reserved, MaxUsed and Target, is the sum of the
// sizes of all records, whatever a policy selects.
//
// Computing a plan takes O(n log n) time for n records and their parents.
package policy
