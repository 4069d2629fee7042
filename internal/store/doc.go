// Package store keeps what must outlive any node: API keys, join tokens, members, node records, templates and cluster secrets.
//
// It owns an embedded etcd member, the layout of its keys, and the schema of the records. Every write is one etcd
// transaction guarded by the revisions that it was decided on, so concurrent writers never lose each other's work. It
// must not hold anything that grows with use: events, usage and running sandboxes belong elsewhere. The member listens
// on no socket; the only client is the one in this process.
//
// A Store is safe for concurrent use. Open starts etcd, which owns its goroutines until Close has waited for them; Run
// follows changes made by other members and blocks until its context ends. Locks: keyCache.mu and refusals.mu, held for map work
// only and never together. Who leads, or is there, is known by leases: see Campaign and Attend.
package store
