package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// endRecords removes what is noted of a sandbox that is no more. A placement stays while copies of before may be somewhere.
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

// ending is a sandbox that has ended at a node, as that says.
type ending struct {
	id   sandbox.ID
	node sandbox.NodeID
	// killed means that somebody wanted it.
	killed bool
}

// concludeEnds has what nodes say has ended count in the store, before they are told that they may forget it: nothing brings it
// back from then on. What was killed on a node that was cut off ends wherever it was brought back meanwhile.
func (c *Control) concludeEnds(ctx context.Context, all []ending) error {
	for _, e := range all {
		if !c.noted.elsewhere(e.id, e.node) {
			if err := c.endRecords(ctx, e.id); err != nil {
				return err
			}
			continue
		}
		if !e.killed || c.noted.doomed(e.id) || c.index.isOver(e.id) {
			continue
		}
		p, _ := c.noted.placement(e.id)
		k := sandbox.KillIntent{ID: e.id, Node: p.Node, At: time.Now().UTC()}
		why := fmt.Sprintf("killed on node %s while no server reached that", c.fleet.nameOf(e.node))
		if err := c.putKill(ctx, k, why, why+": what was brought back on node "+c.fleet.nameOf(p.Node)+" ends"); err != nil {
			return err
		}
	}
	return nil
}

// forgetStale has the nodes that answer drop the copies that do not count, once the one that counts is there.
func (c *Control) forgetStale(ctx context.Context, p sandbox.Placement) error {
	release, ok := c.busy.try(p.ID)
	if !ok {
		return nil // who is asked to receive it now is not stale
	}
	defer release()
	if p, ok = c.noted.placement(p.ID); !ok || !p.Ended && !c.confirmed(p) {
		return nil
	}
	below := int64(math.MaxInt64) // nothing of it is to stay
	if box, ok := c.index.get(p.ID); ok && !p.Ended {
		below = max(p.Generation, box.Generation)
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
	return ok && box.NodeID == p.Node && box.Generation >= p.Generation && box.State != sandbox.StateMigrating && !box.State.Ended()
}

// hasIt asks a node whether it has a sandbox that has not ended.
func (c *Control) hasIt(ctx context.Context, id sandbox.ID, at sandbox.NodeID) (bool, error) {
	box, known, err := c.ask(ctx, id, at)
	return known && !box.State.Ended(), err
}

// knows asks a node whether it has a sandbox, or has had one that ended lately.
func (c *Control) knows(ctx context.Context, id sandbox.ID, at sandbox.NodeID) (bool, error) {
	_, known, err := c.ask(ctx, id, at)
	return known, err
}

// ask asks a node for a sandbox.
func (c *Control) ask(ctx context.Context, id sandbox.ID, at sandbox.NodeID) (box sandbox.Sandbox, known bool, err error) {
	agent, err := c.agent(at)
	if err != nil {
		return box, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Get(ctx, &agentv1.GetRequest{Id: string(id)})
	if err = fromNode(at, err); errors.Is(err, sandbox.ErrNotFound) {
		return box, false, nil
	}
	if err != nil {
		return box, false, err
	}
	box, err = sandboxFromWire(at, resp.GetSandbox())
	return box, err == nil, err
}

// askAgain looks whether the node of this process still has a sandbox that a report has left out, which may have been written
// before there was one.
func (c *Control) askAgain(ctx context.Context, id sandbox.ID, at sandbox.NodeID) error {
	there, err := c.hasIt(ctx, id, at)
	if err != nil || there {
		return err
	}
	now := time.Now().UTC()
	c.index.change(id, now, func(e *entry) bool {
		if e.box.NodeID != at || e.box.State == sandbox.StateDeleted {
			return false
		}
		e.box = givenUp(&e.box)
		e.box.EndedAt = now
		return true
	})
	return nil
}

// endCopy has a node end what it has of a sandbox that is no more, whatever that is.
func (c *Control) endCopy(ctx context.Context, id sandbox.ID, at sandbox.NodeID) error {
	err := c.killAt(ctx, at, id)
	if errors.Is(err, sandbox.ErrConflict) { // it is on its way, and nobody else decides about it
		return c.forgetAt(ctx, id, at, 0)
	}
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	c.strays.resolve(id, at)
	return c.dropStale(ctx, id, at)
}

// forgetCopy has a node drop its copy of a sandbox, which does not count. Where that fails, the placement and the node's
// reports say that it is to be done.
func (c *Control) forgetCopy(ctx context.Context, id sandbox.ID, at sandbox.NodeID, below int64) {
	err := c.forgetAt(ctx, id, at, below)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "copy of a sandbox not dropped yet", slog.String("sandbox_id", string(id)), nodeAttr(at), errAttr(err))
	}
}

func (c *Control) forgetAt(ctx context.Context, id sandbox.ID, at sandbox.NodeID, below int64) error {
	agent, err := c.agent(at)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Forget(ctx, &agentv1.ForgetRequest{Id: string(id), Below: below})
	if err = fromNode(at, err); err != nil {
		return err
	}
	c.fleet.answered(at, resp.GetLoad())
	c.strays.resolve(id, at)
	return c.dropStale(ctx, id, at)
}

// dropStale notes in a sandbox's placement that a node has no copy any more. A placement without such nodes goes when its
// sandbox has ended, or is where its id says.
func (c *Control) dropStale(ctx context.Context, id sandbox.ID, at sandbox.NodeID) error {
	if p, ok := c.noted.placement(id); !ok || !slices.Contains(p.Stale, at) {
		return nil
	}
	return c.changePlacement(ctx, id, func(p *sandbox.Placement) bool {
		p.DropStale(at)
		return len(p.Stale) > 0 || !p.Ended && p.Node != id.Node()
	})
}
