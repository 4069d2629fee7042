package control

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// DrainRequest says how a node is to be emptied.
type DrainRequest struct {
	// Timeout is how long to try; 0 for as long as it takes. What is left then stays where it is or, with Force, is ended.
	Timeout time.Duration
	// MaxParallel is how many sandboxes are moved at once, 1 to MaxDrainParallel; 4 where it is 0.
	MaxParallel int
	// Force ends what cannot be moved: at the timeout, or without one as soon as that is clear.
	Force bool
	// Reason is shown with the node.
	Reason string
}

// MaxDrainParallel bounds the sandboxes of one node that are moved at once.
const MaxDrainParallel = 32

const (
	defaultDrainParallel = 4
	maxDrainTimeout      = 30 * 24 * time.Hour
)

// DrainProgress is how far a node has been emptied.
type DrainProgress struct {
	StartedAt time.Time
	Deadline  time.Time
	DoneAt    time.Time
	Force     bool
	// Error says why it was given up.
	Error string
	// Moved and Ended count sandboxes since this server began, Left is how many are there still.
	Moved int
	Ended int
	Left  int
	// Stuck says why nothing can be done at present, so that the drain does not end by itself; empty while it goes on.
	Stuck string
	// Waiting says what else is waited for: builds, and templates that no other node has.
	Waiting []string
	// Failed are the sandboxes that could not be moved at the last attempt, with the reason.
	Failed []DrainFailure
}

// DrainFailure is why a sandbox could not be moved.
type DrainFailure struct {
	ID     sandbox.ID
	Reason string
}

// maxFailures bounds the failures that a progress names.
const maxFailures = 100

// DrainNode gives a node no new sandboxes and has those that it has go on elsewhere; it returns at once, and GetNode shows how
// far that is. Asked again, it goes on with the new settings. UpdateNode with Cordoned false calls it off.
// Errors: ErrNotFound, ErrInvalid.
func (c *Control) DrainNode(ctx context.Context, idOrName string, req DrainRequest) (Node, error) {
	if err := req.check(); err != nil {
		return Node{}, err
	}
	n, err := c.GetNode(ctx, idOrName)
	if err != nil {
		return Node{}, err
	}
	now := time.Now().UTC()
	settings, err := c.settings.UpdateNodeSettings(ctx, n.ID, func(s *sandbox.NodeSettings) error {
		cordon := true
		(&NodeChange{Cordoned: &cordon, Reason: req.Reason}).cordon(s, now)
		s.Drain = &sandbox.NodeDrain{StartedAt: now, MaxParallel: req.MaxParallel, Force: req.Force}
		if req.Timeout > 0 {
			s.Drain.Deadline = now.Add(req.Timeout)
		}
		return nil
	})
	if err != nil {
		return Node{}, fmt.Errorf("drain node %s: %w", n.Name, err)
	}
	c.fleet.set(n.ID, settings)
	c.drains.kick()
	c.log.LogAttrs(ctx, slog.LevelInfo, "node is being drained", nodeAttr(n.ID), slog.Duration("timeout", req.Timeout), slog.Bool("force", req.Force))
	c.note(ctx, Event{Type: "node_draining", NodeID: n.ID, Message: fmt.Sprintf("node %s gives its sandboxes to others", n.Name)})
	return c.GetNode(ctx, string(n.ID))
}

func (r *DrainRequest) check() error {
	setDefault(&r.MaxParallel, defaultDrainParallel)
	switch {
	case r.MaxParallel < 1 || r.MaxParallel > MaxDrainParallel:
		return sandbox.Invalidf("max_parallel %d: want 1 to %d", r.MaxParallel, MaxDrainParallel)
	case r.Timeout < 0 || r.Timeout > maxDrainTimeout:
		return sandbox.Invalidf("timeout %v: want 0, which is none, to %v", r.Timeout, maxDrainTimeout)
	case len(r.Reason) > maxReason:
		return sandbox.Invalidf("reason of %d bytes: want at most %d", len(r.Reason), maxReason)
	}
	return nil
}

// drains is what runDrains remembers of each node that is being emptied.
type drains struct {
	wake chan struct{}

	mu     sync.Mutex
	byNode map[sandbox.NodeID]*draining
}

// draining is one node's. The mutex of drains guards it.
type draining struct {
	started time.Time
	running bool
	moved   int
	ended   int
	left    int
	stuck   string
	waiting []string
	failed  map[sandbox.ID]failure
}

type failure struct {
	reason string
	at     time.Time
	// hopeless means that trying again does not help by itself.
	hopeless bool
}

func newDrains() *drains {
	return &drains{wake: make(chan struct{}, 1), byNode: make(map[sandbox.NodeID]*draining)}
}

func (d *drains) kick() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// begin takes a node; it is false where somebody is at it.
func (d *drains) begin(node sandbox.NodeID, started time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.byNode[node]
	if old != nil && old.running {
		return false
	}
	if old == nil || !old.started.Equal(started) {
		old = &draining{started: started, failed: make(map[sandbox.ID]failure)}
		d.byNode[node] = old
	}
	old.running = true
	return true
}

func (d *drains) end(node sandbox.NodeID) {
	d.change(node, func(g *draining) { g.running = false })
}

func (d *drains) change(node sandbox.NodeID, f func(*draining)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if g := d.byNode[node]; g != nil {
		f(g)
	}
}

// recently reports whether a sandbox could not be moved a moment ago.
func (d *drains) recently(node sandbox.NodeID, id sandbox.ID, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	g := d.byNode[node]
	if g == nil {
		return false
	}
	f, ok := g.failed[id]
	return ok && now.Sub(f.at) < moveBackoff
}

// progress returns what GetNode shows of a node's drain; nil where there is none.
func (d *drains) progress(node sandbox.NodeID, s *sandbox.NodeDrain) *DrainProgress {
	if s == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	p := &DrainProgress{StartedAt: s.StartedAt, Deadline: s.Deadline, DoneAt: s.DoneAt, Force: s.Force, Error: s.Error}
	g := d.byNode[node]
	if g == nil || !g.started.Equal(s.StartedAt) {
		return p
	}
	p.Moved, p.Ended, p.Left, p.Waiting, p.Stuck = g.moved, g.ended, g.left, slices.Clone(g.waiting), g.stuck
	for _, id := range slices.Sorted(maps.Keys(g.failed)) {
		if len(p.Failed) < maxFailures {
			p.Failed = append(p.Failed, DrainFailure{ID: id, Reason: g.failed[id].reason})
		}
	}
	return p
}

// summary says what is left, for people.
func (p *DrainProgress) summary() string {
	parts := make([]string, 0, 3)
	if p.Left > 0 {
		parts = append(parts, fmt.Sprintf("%d sandboxes are left", p.Left))
	}
	if len(p.Failed) > 0 {
		parts = append(parts, "the first of them: "+p.Failed[0].Reason)
	}
	return strings.Join(append(parts, p.Waiting...), "; ")
}
