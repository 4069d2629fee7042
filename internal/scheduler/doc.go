// Package scheduler decides which nodes may take a sandbox, in what order, and why.
//
// It owns the decision and its explanation. It performs no I/O, keeps no state, starts no goroutine and reads no clock:
// Place is a function of its arguments, the source of randomness among them, so that a decision can be replayed. The
// view that it is given may be old; the node that is asked has the last word.
package scheduler
