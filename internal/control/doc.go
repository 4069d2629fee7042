// Package control is what the server decides and remembers: one file per operation.
//
// It owns the index of sandboxes and nodes in memory, and the choice of the node that carries out a command. Commands
// go down through agent.v1 to a node and nowhere else; facts come up through node.v1 (report.go) and are the truth.
// Creating a sandbox writes nothing to the store. Control must not run sandboxes, dial guests, or know HTTP.
//
// A create goes validate -> resolve -> place -> dispatch -> index; all of it is in create.go.
//
// A Control is safe for concurrent use. Run owns its goroutines: those that follow builds, the one that forgets ended
// sandboxes, and the one that removes from nodes what a crash left there. Locks: index.mu, fleet.mu, catalog.mu, builds.mu,
// saving.mu and finder.mu; none is held while another is taken, and none during I/O.
package control
