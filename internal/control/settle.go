package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// settleEvery is how often copies that do not count are looked at.
	settleEvery = time.Second
	// settleAfter is how long a sandbox is left on its way that nobody here moves: an earlier server's commands may still be
	// carried out.
	settleAfter = 5 * time.Second
	// maxSettling bounds the sandboxes that are settled at once.
	maxSettling = 8
)

// copyOf names what one node has of a sandbox.
type copyOf struct {
	id   sandbox.ID
	node sandbox.NodeID
}

// stray is a copy of a sandbox that does not count, or of which that is not decided.
type stray struct {
	box   sandbox.Sandbox
	since time.Time
}

// strays are the copies that runSettle has to do something about, as the nodes reported them.
type strays struct {
	wake chan struct{}

	mu     sync.Mutex
	copies map[copyOf]stray
	// over are sandboxes that ended, whose records may go; dropped are copies that are gone.
	over    map[sandbox.ID]struct{}
	dropped map[copyOf]struct{}
}

func newStrays() *strays {
	return &strays{
		wake: make(chan struct{}, 1), copies: make(map[copyOf]stray), over: make(map[sandbox.ID]struct{}), dropped: make(map[copyOf]struct{}),
	}
}

// kick has runSettle look now.
func (s *strays) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *strays) add(box sandbox.Sandbox, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := copyOf{box.ID, box.NodeID}
	if old, ok := s.copies[at]; ok {
		now = old.since
	}
	s.copies[at] = stray{box: box, since: now}
}

func (s *strays) resolve(id sandbox.ID, node sandbox.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.copies, copyOf{id, node})
}

// forgotten notes that a node says that it has nothing of a sandbox any more.
func (s *strays) forgotten(id sandbox.ID, node sandbox.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropped[copyOf{id, node}] = struct{}{}
}

// ended notes that a sandbox is no more.
func (s *strays) ended(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over[id] = struct{}{}
}

// onlyNamed drops the copies of a node that it did not name in a full report.
func (s *strays) onlyNamed(node sandbox.NodeID, named map[sandbox.ID]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.copies, func(at copyOf, _ stray) bool {
		_, ok := named[at.id]
		return at.node == node && !ok
	})
}

// bySandbox returns the copies of each sandbox.
func (s *strays) bySandbox() map[sandbox.ID][]stray {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[sandbox.ID][]stray, len(s.copies))
	for at, one := range s.copies {
		out[at.id] = append(out[at.id], one)
	}
	return out
}

// takeEnds returns what ended and what was dropped since the last call.
func (s *strays) takeEnds() (over map[sandbox.ID]struct{}, dropped map[copyOf]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	over, dropped = s.over, s.dropped
	s.over, s.dropped = make(map[sandbox.ID]struct{}), make(map[copyOf]struct{})
	return over, dropped
}

// runSettle brings to an end what moves, losses and kills have left: copies that do not count, sandboxes on their way that
// nobody moves, and kills that nodes were away for.
func (c *Control) runSettle(ctx context.Context) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-c.strays.wake:
		}
		c.settleAll(ctx, time.Now())
	}
}

func (c *Control) settleAll(ctx context.Context, now time.Time) {
	var g errgroup.Group
	g.SetLimit(maxSettling)
	do := func(id sandbox.ID, what string, f func() error) {
		g.Go(func() error {
			if err := f(); err != nil && ctx.Err() == nil {
				c.log.LogAttrs(ctx, slog.LevelWarn, "sandbox not settled, trying again", slog.String("sandbox_id", string(id)), slog.String("what", what), errAttr(err))
			}
			return nil
		})
	}
	over, dropped := c.strays.takeEnds()
	for at := range dropped {
		do(at.id, "dropped", func() error { return c.dropStale(ctx, at.id, at.node) })
	}
	for id := range over {
		do(id, "ended", func() error { return c.endRecords(ctx, id) })
	}
	for _, k := range c.noted.allKills() {
		if c.fleet.isReady(k.Node) {
			do(k.ID, "kill", func() error { return c.killWanted(ctx, k) })
		}
	}
	for _, p := range c.noted.allPlacements() {
		if len(p.Stale) > 0 && !c.busy.has(p.ID) {
			do(p.ID, "stale", func() error { return c.forgetStale(ctx, p) })
		}
	}
	for id, copies := range c.strays.bySandbox() {
		if !c.noted.doomed(id) {
			do(id, "copies", func() error { return c.settleOne(ctx, id, copies, now) })
		}
	}
	_ = g.Wait() // each has told of its own error
}

// endRecords removes what is noted of a sandbox that is no more. A placement stays while old copies may be somewhere.
func (c *Control) endRecords(ctx context.Context, id sandbox.ID) error {
	if box, ok := c.index.get(id); ok && !box.State.Ended() {
		return nil
	}
	err := c.unguard(ctx, id)
	if _, ok := c.noted.placement(id); ok && err == nil {
		err = c.changePlacement(ctx, id, func(p *sandbox.Placement) bool {
			p.Ended = true
			return len(p.Stale) > 0
		})
	}
	if err != nil {
		c.strays.ended(id) // again
	}
	return err
}

// forgetStale has the nodes that answer drop the copies that a placement outdates, once the one that counts is there.
func (c *Control) forgetStale(ctx context.Context, p sandbox.Placement) error {
	if !p.Ended && !c.confirmed(p) {
		return nil
	}
	below := p.Generation
	if p.Ended {
		below++
	}
	var errs []error
	for _, node := range p.Stale {
		_, known := c.fleet.record(node)
		switch {
		case !known: // it was removed from the cluster
			errs = append(errs, c.dropStale(ctx, p.ID, node))
		case c.fleet.isReady(node):
			errs = append(errs, c.forgetAt(ctx, p.ID, node, below))
		}
	}
	return errors.Join(errs...)
}

// confirmed reports whether the copy that a placement names is known to be there, and counts.
func (c *Control) confirmed(p sandbox.Placement) bool {
	box, ok := c.index.get(p.ID)
	return ok && box.NodeID == p.Node && box.Generation >= p.Generation && box.State != sandbox.StateMigrating && box.State != sandbox.StateLost
}

// settleOne decides about the copies of one sandbox: what its placement outdates goes, what it names arrives, and where it
// says nothing a received copy goes on, or without one the copy that departed.
func (c *Control) settleOne(ctx context.Context, id sandbox.ID, copies []stray, now time.Time) error {
	release, ok := c.busy.try(id)
	if !ok {
		return nil // it is being moved
	}
	defer release()
	if err := c.reloadPlacement(ctx, id); err != nil {
		return fmt.Errorf("read the placement of sandbox %s: %w", id, err)
	}
	p, placed := c.noted.placement(id)
	open := make([]stray, 0, len(copies))
	for _, one := range copies {
		box := &one.box
		switch {
		case !c.fleet.isReady(box.NodeID):
		case placed && p.Outdates(box.NodeID, box.Generation):
			if p.Ended || c.confirmed(p) {
				return c.forgetAt(ctx, id, box.NodeID, p.Generation+1)
			}
		case placed && p.Node == box.NodeID && box.Received && box.Generation == p.Generation:
			return c.arriveAnyhow(ctx, id, box.NodeID, p.Generation)
		case box.State == sandbox.StateMigrating && now.Sub(one.since) >= settleAfter:
			open = append(open, one)
		}
	}
	if len(open) == 0 {
		return nil
	}
	slices.SortFunc(open, func(a, b stray) int {
		return cmp.Or(btoi(b.box.Received)-btoi(a.box.Received), cmp.Compare(b.box.Generation, a.box.Generation))
	})
	return c.settleOpen(ctx, open)
}

// settleOpen has the first of the copies count. A received one that cannot run gives way to the one that departed.
func (c *Control) settleOpen(ctx context.Context, open []stray) error {
	box := open[0].box
	next := sandbox.Placement{ID: box.ID, Node: box.NodeID, Generation: box.Generation}
	if !box.Received {
		next.Generation++
	}
	for _, other := range open[1:] {
		next.AddStale(other.box.NodeID)
		if !box.Received {
			next.Generation = max(next.Generation, other.box.Generation+1)
		}
	}
	if err := c.commitPlacement(ctx, next); err != nil {
		return err
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "sandbox settled", slog.String("sandbox_id", string(box.ID)), nodeAttr(box.NodeID), slog.Int64("generation", next.Generation))
	if !box.Received {
		return c.giveBack(ctx, box.ID, box.NodeID, next.Generation)
	}
	if len(open) == 1 || open[1].box.Received {
		return c.arriveAnyhow(ctx, box.ID, box.NodeID, next.Generation)
	}
	_, err := c.arrive(ctx, box.ID, box.NodeID, next.Generation)
	if err == nil || errors.Is(err, sandbox.ErrUnavailable) {
		return err
	}
	back := open[1].box
	next = sandbox.Placement{ID: back.ID, Node: back.NodeID, Generation: next.Generation + 1, Stale: []sandbox.NodeID{box.NodeID}}
	if commitErr := c.commitPlacement(ctx, next); commitErr != nil {
		return errors.Join(err, commitErr)
	}
	return c.giveBack(ctx, back.ID, back.NodeID, next.Generation)
}
