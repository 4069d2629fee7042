// Package control is what the server decides and remembers: one file per operation.
//
// It owns the index of sandboxes and nodes in memory, and the choice of the node that carries out a command. Commands
// go down through agent.v1 to a node and nowhere else; facts come up through node.v1 (report.go) and are the truth.
// Creating a sandbox writes nothing to the store. Control must not run sandboxes, dial guests, or know HTTP.
//
// A create goes validate -> resolve -> place -> dispatch -> index; all of it is in create.go. A move is in migrate.go: save,
// receive, commit the placement, arrive, forget. Where several nodes have a copy of a sandbox, the stored placement says which
// one counts, by its generation; settle.go carries that out, whatever broke off. A paused sandbox with a replica record is
// only resumed at home after the record was removed by compare-and-swap, and only brought back elsewhere (guard.go) after it
// was changed so: whoever succeeds has it. What to copy where is planned in replicate.go, which is pure.
//
// A Control is safe for concurrent use. Run owns its goroutines: those that follow builds, drains and copies, the one that
// settles, the one that forgets ended sandboxes, and the one that removes from nodes what a crash left there. busy gives one
// decision at a time a sandbox to itself; it is taken before anything else. Locks: copies.mu before fleet.mu; but for that none
// of index.mu, fleet.mu, catalog.mu, builds.mu, saving.mu, finder.mu, noted.mu, strays.mu, activity.mu, attendance.mu and drains.mu is held while
// another is taken, and none during I/O.
package control
