package sandbox

import (
	"slices"
	"time"
)

// Placement says which node has a sandbox that was moved. It decides where the sandbox is: a copy of a lower generation
// anywhere else does not count.
type Placement struct {
	ID         ID     `json:"id"`
	Node       NodeID `json:"node"`
	Generation int64  `json:"generation"`
	// Stale are nodes that may still have a copy of before.
	Stale []NodeID `json:"stale,omitempty"`
	// Ended means that the sandbox is no more: the record only stays until no node has a copy of it.
	Ended bool      `json:"ended,omitempty"`
	At    time.Time `json:"at"`
}

// Outdates reports whether a copy of a generation at a node is not the one that counts.
func (p *Placement) Outdates(node NodeID, generation int64) bool {
	if node == p.Node {
		return p.Ended || generation < p.Generation
	}
	return generation <= p.Generation
}

// AddStale notes that nodes may have a copy that does not count; the placement's own node never is one.
func (p *Placement) AddStale(nodes ...NodeID) {
	stale := slices.Clone(p.Stale)
	for _, n := range nodes {
		if n != "" && n != p.Node && !slices.Contains(stale, n) {
			stale = append(stale, n)
		}
	}
	p.Stale = slices.DeleteFunc(stale, func(n NodeID) bool { return n == p.Node && !p.Ended })
}

// DropStale notes that a node has no copy any more.
func (p *Placement) DropStale(node NodeID) {
	p.Stale = slices.DeleteFunc(slices.Clone(p.Stale), func(n NodeID) bool { return n == node })
}

// Replica says that a paused sandbox can be brought back without its node. Whoever removes or changes the record by
// compare-and-swap decides: its node, which resumes it, or a server, which brings it back elsewhere.
type Replica struct {
	ID   ID     `json:"id"`
	Home NodeID `json:"home"`
	// Generation is the sandbox's when it was paused at Home.
	Generation  int64      `json:"generation"`
	Checkpoint  string     `json:"checkpoint"`
	ImageDigest string     `json:"image_digest"`
	TemplateID  TemplateID `json:"template_id,omitempty"`
	// Holders have a copy of the checkpoint, Home left out.
	Holders []NodeID `json:"holders,omitempty"`
	Bucket  bool     `json:"bucket,omitempty"`
	// MadeOn is what going on from the checkpoint depends on; nil where that is not known.
	MadeOn *Origin `json:"made_on,omitempty"`
	// Returning means that Home was chosen to have it and may not have taken it yet.
	Returning bool      `json:"returning,omitempty"`
	At        time.Time `json:"at"`
}

// Same reports whether o is the same state of the same record.
func (r *Replica) Same(o Replica) bool {
	return r.ID == o.ID && r.Home == o.Home && r.Generation == o.Generation && r.Checkpoint == o.Checkpoint && r.Returning == o.Returning
}

// Stored says that a checkpoint was, or was to be, written to the bucket, and has not been removed there. At is when that began.
type Stored struct {
	Checkpoint string    `json:"checkpoint"`
	At         time.Time `json:"at"`
}

// KillIntent says that a sandbox is to be killed as soon as its node answers again.
type KillIntent struct {
	ID   ID        `json:"id"`
	Node NodeID    `json:"node"`
	At   time.Time `json:"at"`
}

// Pin says which node was asked to create the sandbox of a request that may be repeated.
type Pin struct {
	// Key is a digest of the caller's key, Request of what was asked for.
	Key     string `json:"key"`
	Request string `json:"request"`
	Node    NodeID `json:"node"`
}

// NodeDrain is how a node is to be emptied, and how far that is.
type NodeDrain struct {
	StartedAt time.Time `json:"started_at"`
	// Deadline is when the attempt is given up, or, with Force, what is left is ended; zero means never.
	Deadline time.Time `json:"deadline,omitzero"`
	// MaxParallel is how many sandboxes are moved at once.
	MaxParallel int  `json:"max_parallel"`
	Force       bool `json:"force,omitempty"`
	// DoneAt is when nothing was left, or it was given up; Error says why in the second case.
	DoneAt time.Time `json:"done_at,omitzero"`
	Error  string    `json:"error,omitempty"`
}

// Active reports whether the node is being emptied.
func (d *NodeDrain) Active() bool { return d != nil && d.DoneAt.IsZero() }

// Drained reports whether the node has been emptied.
func (d *NodeDrain) Drained() bool { return d != nil && !d.DoneAt.IsZero() && d.Error == "" }
