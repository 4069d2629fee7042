package control

import (
	"context"
	"errors"
	"fmt"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const killReason = "killed on request"

// Kill ends a sandbox. One that has failed or is lost is cleared away, and found no more; one whose node does not answer
// is killed as soon as it does, and is gone for everybody else. So is one that waits for the other end of its move.
// Errors: ErrNotFound.
func (c *Control) Kill(ctx context.Context, id sandbox.ID) error {
	if _, err := c.Get(ctx, id); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	release, err := c.busy.take(wait, id) // one that is being moved is killed where it goes
	if err != nil {
		return err
	}
	defer release()
	box, err := c.Get(ctx, id)
	if err != nil {
		return err
	}
	gone := c.noted.isBereft(id)
	if err := c.unguard(ctx, id); err != nil { // nobody is to bring it back
		return fmt.Errorf("kill sandbox %s: %w", id, err)
	}
	if c.fleet.isDown(box.NodeID) && box.State != sandbox.StateFailed || c.isStuck(box) {
		return c.killLater(ctx, box)
	}
	err = c.killAt(ctx, box.NodeID, id)
	switch {
	case errors.Is(err, sandbox.ErrNotFound) && gone: // its node has lost it, and nobody brings it back any more
	case errors.Is(err, sandbox.ErrNotFound) && box.State.Ended():
		c.endsHere(id, killReason)
		return nil
	case errors.Is(err, sandbox.ErrNotFound):
		c.endsHere(id, "its node no longer has it")
		return unknown(id)
	case err != nil:
		return fmt.Errorf("kill sandbox %s: %w", id, err)
	}
	c.buried(id, killReason)
	c.strays.ended(id)
	return nil
}

// isStuck reports whether a sandbox, which nobody moves now, waits to be settled, or is said to be elsewhere than where it was
// heard of.
func (c *Control) isStuck(box sandbox.Sandbox) bool {
	if c.limits.OneNode || box.State.Ended() {
		return false // the node alone decides nothing about moves
	}
	p, ok := c.noted.placement(box.ID)
	return box.State == sandbox.StateMigrating || ok && !p.Ended && p.Node != box.NodeID
}

func (c *Control) killAt(ctx context.Context, node sandbox.NodeID, id sandbox.ID) error {
	agent, err := c.agent(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	_, err = agent.Kill(ctx, &agentv1.KillRequest{Id: string(id), Reason: killReason})
	return fromNode(node, err)
}
