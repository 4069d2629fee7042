// Package lifecycle decides what becomes of sandboxes whose time has come: which are ended, which are paused, and which are
// left alone because somebody uses them.
//
// Plan is the decision: a pure function over values. Run carries it out for as long as this server leads, through the node
// that has the sandbox, under the generation that the decision was made for, so that a node refuses one that is stale. The
// package owns no records: what it keeps in memory is made again from the index after a change of leader. It must not
// talk to nodes or proxies itself, or decide where sandboxes run.
//
// A Loop's mutex guards its queue and is never held across a call. Observe may be called by any goroutine, also under the
// index's lock.
package lifecycle
