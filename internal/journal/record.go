package journal

import (
	"net/netip"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxLines bounds the lines that a record keeps.
const maxLines = 32

// Record is what a node remembers of one sandbox. Its Checkpoint, which is also set while the sandbox is being paused in it or
// resumed from it, belongs to the record.
type Record struct {
	sandbox.Sandbox

	// Warm means that the sandbox was made ahead of demand and nobody has claimed it; its state is creating until then.
	Warm bool `json:"warm,omitempty"`
	// Ready means that the agent inside a warm sandbox has answered.
	Ready bool `json:"ready,omitempty"`
	// Source is the checkpoint that the sandbox was started from; empty for one that was started from its image.
	Source string `json:"source,omitempty"`
	// Rewinding means that a sandbox that is resuming was running before: it is to run again, not to be paused.
	Rewinding bool `json:"rewinding,omitempty"`
	// Runs means that a migrating sandbox was running before: it is to run again where it arrives, or when it returns.
	Runs bool `json:"runs,omitempty"`
	// Rests means that a sandbox that is stopping was still before: it holds no more than it did then.
	Rests bool `json:"rests,omitempty"`
	// Guarded means that a paused sandbox can be brought back on another node: to run here, it needs the server's permit.
	Guarded bool `json:"guarded,omitempty"`
	// Deadline is when a pausing or resuming sandbox has to be something else, and when the server is reminded of a migrating
	// one.
	Deadline time.Time `json:"deadline,omitzero"`
	// Clock is the one by which EndAt and Deadline are meant; zero where that is not known.
	Clock Clock `json:"clock,omitzero"`
	// Guest is what every process inside starts with, for when the sandbox boots anew.
	Guest sandbox.GuestSettings `json:"guest,omitzero"`
	// TokenOf is the sandbox whose access token the agent inside demands, until it is told its own; empty for none.
	TokenOf sandbox.ID `json:"token_of,omitempty"`
	// BuildID names the build that the sandbox is for; nobody else is ever told of such a sandbox.
	BuildID string `json:"build_id,omitempty"`
	// IdempotencyKey is the key of the request that made the sandbox; empty for none.
	IdempotencyKey string `json:"idempotency_key,omitempty"`
	// Network is how the machine reaches the sandbox; its zero value means that it has no network yet.
	Network Network `json:"network,omitzero"`
	// Ending says how the sandbox is to end, from the moment when that is decided.
	Ending Ending `json:"ending,omitzero"`
	// Lines are the last events of its life, oldest first, at most 32.
	Lines []Line `json:"lines,omitempty"`
	// Last names the newest change that was made of it: the change's number, kind and time. The journal sets it.
	Last Mark `json:"last,omitzero"`
}

// Clock says how a machine's wall clock stood, so that one who comes later can tell by how much it was set since.
type Clock struct {
	// Boot names the start of the machine from which its monotonic clock counts.
	Boot string `json:"boot,omitempty"`
	// Ahead is by how much the wall clock, counted from 1970 in UTC, was ahead of the monotonic one.
	Ahead time.Duration `json:"ahead,omitempty"`
}

// Network is what it takes to find a sandbox's network again.
type Network struct {
	NetNS     string     `json:"netns,omitempty"`
	Link      string     `json:"link,omitempty"`
	GuestAddr netip.Addr `json:"guest_addr,omitzero"`
	Gateway   netip.Addr `json:"gateway,omitzero"`
}

// Ending is the decided end of a sandbox.
type Ending struct {
	State  sandbox.State `json:"state,omitempty"`
	Reason string        `json:"reason,omitempty"`
	// Type is the type of the change that reports it.
	Type string `json:"type,omitempty"`
}

// Line is one event in a sandbox's life, for people.
type Line struct {
	Time    time.Time `json:"time"`
	Level   string    `json:"level"`
	Message string    `json:"message"`
}

// Mark names a change.
type Mark struct {
	Sequence int64     `json:"sequence,omitempty"`
	Type     string    `json:"type,omitempty"`
	Time     time.Time `json:"time,omitzero"`
}

// Append adds a line and drops the oldest where there are too many. It never writes to a slice that it was given.
func (r *Record) Append(l Line) {
	from := max(0, len(r.Lines)+1-maxLines)
	r.Lines = append(append(make([]Line, 0, len(r.Lines)+1-from), r.Lines[from:]...), l)
}

// Still reports whether a sandbox needs neither processor time nor memory: it is paused, moves as a paused one, or is ending
// from there.
func (r *Record) Still() bool {
	switch r.State { //nolint:exhaustive // all others run, or have ended
	case sandbox.StatePaused:
		return true
	case sandbox.StateMigrating:
		return !r.Runs
	case sandbox.StateStopping:
		return r.Rests
	default:
		return false
	}
}

// Held returns what a sandbox takes of the machine: a still one no processor time and no memory, but its checkpoint's room on
// the disk. One that moves holds at both ends what it takes where it runs, so that it can go on at either.
func (r *Record) Held() sandbox.Resources {
	kept := sandbox.Resources{DiskBytes: r.PausedBytes}
	switch {
	case r.State.Ended():
		return sandbox.Resources{}
	case r.Still():
		return kept
	}
	return r.Resources.Add(kept)
}

// Change is one numbered fact for the server.
type Change struct {
	// Sequence is set by the journal: 1, 2, 3 and so on.
	Sequence int64     `json:"-"`
	Type     string    `json:"type"`
	Time     time.Time `json:"time"`
	// Sandbox is the sandbox as it was after the change.
	Sandbox sandbox.Sandbox `json:"sandbox"`
}

// Image is a root file system that the node has.
type Image struct {
	Digest     string             `json:"digest"`
	TemplateID sandbox.TemplateID `json:"template_id"`
	Bytes      int64              `json:"bytes"`
	Source     string             `json:"source,omitempty"`
	BuiltAt    time.Time          `json:"built_at"`
	// Templates are those that need the image. PutImage adds TemplateID, ReleaseImage takes out.
	Templates []sandbox.TemplateID `json:"templates,omitempty"`
	// Removed means that no template needs the image: it goes when nothing else does.
	Removed bool `json:"removed,omitempty"`
}

// Amount is resources and the number of sandboxes that hold them.
type Amount struct {
	Resources sandbox.Resources
	Sandboxes int
}

func (a Amount) add(r sandbox.Resources) Amount {
	return Amount{Resources: a.Resources.Add(r), Sandboxes: a.Sandboxes + 1}
}

func (a Amount) sub(r sandbox.Resources) Amount {
	return Amount{Resources: a.Resources.Sub(r), Sandboxes: a.Sandboxes - 1}
}

// Ledger is the journal's sums at one moment.
type Ledger struct {
	Capacity sandbox.Resources
	// Allocated is what all sandboxes hold, the warm ones included. Paused ones are in its resources, not in its number.
	Allocated Amount
	// Paused is the number of sandboxes that are paused, or move as such.
	Paused int
	// Warm is what the unclaimed warm ones hold.
	Warm Amount
	// Creating counts sandboxes that somebody waits for.
	Creating int
	// Sequence is the number of the last change; Acknowledged is the last that the server is known to have.
	Sequence, Acknowledged int64
	// Oldest is the number of the oldest change that is still kept; Sequence+1 when none is.
	Oldest int64
}
