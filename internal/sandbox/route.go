package sandbox

import "time"

// Route is what traffic needs to know of a sandbox: where it is, and whether it takes requests.
type Route struct {
	ID    ID
	Node  NodeID
	State State
	// Reason says why the state is what it is; users see it for failed and lost sandboxes.
	Reason string
	// Generation grows with each change of the sandbox. Connections that were kept for an earlier one are not reused.
	Generation int64
	// Secure means that the agent inside demands a token.
	Secure bool
	// AutoResume means that a request makes it run again while it is paused.
	AutoResume bool
}

// News reports whether r says something else than seen about where the sandbox is and what it does.
func (r Route) News(seen Route) bool {
	return r.State != seen.State || r.Generation != seen.Generation || r.Node != seen.Node
}

// Route returns what traffic needs to know of the sandbox.
func (b *Sandbox) Route() Route {
	return Route{
		ID: b.ID, Node: b.NodeID, State: b.State, Reason: b.Reason, Generation: b.Generation, Secure: b.Secure,
		AutoResume: b.AutoResume && b.PausedKind != CheckpointFiles, // its processes are not there for a request to meet
	}
}

// NodeRoute is how a node is reached.
type NodeRoute struct {
	ID NodeID
	// Address is the HOST:PORT on which it answers other members; empty where only a server reaches it.
	Address string
	// Down means that it does not answer: what runs there cannot be reached.
	Down bool
	// Unheard means that the server does not know yet what runs there.
	Unheard bool
}

// Activity is what one sandbox was used for through one proxy.
type Activity struct {
	ID ID
	// Open counts the requests that are open, streams and upgraded connections included.
	Open int
	// Last is when the last byte passed, or the last request ended.
	Last time.Time
}
