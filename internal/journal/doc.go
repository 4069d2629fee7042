// Package journal is a node's local truth: which sandboxes it has, what they hold of the machine, and which changes its
// server does not know yet.
//
// It owns one SQLite file, opened exclusively by one process. It decides admission (the ledger), numbers changes without
// gaps, and checks that records only move along the table of states. It must not start or stop anything, talk to
// anybody, or have opinions about when a sandbox ends.
//
// A write is soft or durable. Soft survives the end of the process, which is all that a fact about a running process
// needs: it does not survive the machine either. Durable is on the disk before the call returns; every write that
// carries a change is durable, so that a reported sequence number is never used twice.
//
// A Journal is safe for concurrent use. Writers that meet are committed together: whoever holds lead takes the whole
// queue through one transaction. Lock order: lead, then mu. No goroutines.
package journal
