// Package agent is the node: it carries out a server's commands on this machine, keeps what it runs alive and accounted
// for, and reports every change.
//
// It owns the sandboxes of one machine from admission to their end: their records (through journal), guests (engine),
// networks and images, the pool of warm ones, their timeouts, and the only way to connect to them (DialGuest). It is the
// last word on admission and the truth about state. It must not know projects, users, names of templates or other nodes,
// and never calls a server except to register and report.
//
// A create goes create.go -> pool.go (a warm one is claimed) or start.go (a cold start) -> running. Whatever time decides
// (timeouts, retries, the pool's size, what may be forgotten) is decided by Plan in plan.go, a pure function, and carried
// out by the one loop in run.go.
//
// What is kept of a sandbox that does not run is a checkpoint (package snapshot): pause.go and resume.go exchange it for the
// guest and back, rollback.go one for another. At each moment the record says which of the two counts: in running and
// pausing the guest, in paused and resuming the checkpoint; the other is removed, after a crash as in the middle of things.
//
// A failed step needs no list of what to take back: Stop, Release and Forget do nothing where there is nothing, so that
// clear, which is all three, is the clean-up after every step, after a crash, and on each retry.
//
// Concurrency: an Agent is safe for concurrent use. Whoever changes a sandbox holds its instance's op, which is a lock
// that can be waited for with a context and held across I/O. Lock order: instance.op, then Agent.mu, then instance.mu;
// the mutexes are never held across I/O. Background goroutines belong to the crew; Run returns when all have exited.
package agent
