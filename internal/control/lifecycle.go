package control

import (
	"context"
	"errors"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// settleInterval is how often a sandbox that is on its way from one state to another is looked at.
const settleInterval = 20 * time.Millisecond

// held is a sandbox with the client of the node that has it.
type held struct {
	box   sandbox.Sandbox
	agent agentv1connect.AgentServiceClient
}

// hold finds a sandbox that has not ended, and its node. One that is being moved is waited for.
// Errors: ErrNotFound, ErrUnavailable, at once where its node does not answer.
func (c *Control) hold(ctx context.Context, id sandbox.ID) (held, error) {
	wait, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	box, err := c.arrived(wait, id)
	if err != nil {
		return held{}, err
	}
	if c.fleet.isDown(box.NodeID) {
		return held{}, c.away(box)
	}
	agent, err := c.agent(box.NodeID)
	return held{box: box, agent: agent}, err
}

// arrived returns a sandbox once it is not on its way from one node to another. Errors: ErrNotFound, ErrUnavailable.
func (c *Control) arrived(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	for {
		box, err := c.live(ctx, id)
		if err != nil || box.State != sandbox.StateMigrating {
			return box, err
		}
		if pause(ctx, settleInterval); ctx.Err() != nil {
			return box, sandbox.Unavailablef("sandbox %s is being moved to another node, which takes too long: try again", id)
		}
	}
}

// look asks the node what a sandbox is now, which the index may not know yet. Errors: ErrNotFound, ErrUnavailable.
func (c *Control) look(ctx context.Context, h held) (sandbox.Sandbox, error) {
	resp, err := h.agent.Get(ctx, &agentv1.GetRequest{Id: string(h.box.ID)})
	if err = fromNode(h.box.NodeID, err); errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Sandbox{}, unknown(h.box.ID)
	}
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	return c.learn(h.box.NodeID, resp.GetSandbox())
}

// settled carries out a command, and does so again while the node refuses it because the sandbox is on its way from one
// state to another: whether the command is possible is only known once it has arrived. h follows a sandbox that is moved
// to another node meanwhile; command is to use it.
func (c *Control) settled(ctx context.Context, h *held, command func(context.Context) error) error {
	for {
		err := fromNode(h.box.NodeID, command(ctx))
		if !errors.Is(err, sandbox.ErrConflict) && !errors.Is(err, sandbox.ErrNotFound) {
			return err
		}
		if c.moved(ctx, h) {
			continue
		}
		if errors.Is(err, sandbox.ErrNotFound) {
			return err
		}
		box, lookErr := c.look(ctx, *h)
		if lookErr != nil || !onItsWay(box.State) {
			return err
		}
		if pause(ctx, settleInterval); ctx.Err() != nil {
			return err
		}
	}
}

// moved takes what is known of a sandbox that another node has by now, or will have in a moment.
func (c *Control) moved(ctx context.Context, h *held) bool {
	box, ok := c.index.get(h.box.ID)
	if !ok || box.State != sandbox.StateMigrating && box.NodeID == h.box.NodeID {
		return false
	}
	box, err := c.arrived(ctx, h.box.ID)
	if err != nil || box.NodeID == h.box.NodeID && box.Generation == h.box.Generation {
		return false
	}
	agent, err := c.agent(box.NodeID)
	if err != nil {
		return false
	}
	h.box, h.agent = box, agent
	return true
}

// passing has the index say, until the returned function is called or the node says more, that a sandbox is on its way:
// nodes do not report states that last for milliseconds, and traffic should not try its luck meanwhile. What was concluded
// from its node's silence while it was on its way is put right then, since the node will not say more of what it never heard.
func (c *Control) passing(h held, from, through sandbox.State) (done func()) {
	c.index.change(h.box.ID, time.Now(), func(e *entry) bool {
		if e.box.State != from || e.box.Generation != h.box.Generation {
			return false
		}
		e.box.State = through
		return true
	})
	return func() {
		c.index.change(h.box.ID, time.Now(), func(e *entry) bool {
			switch {
			case e.box.Generation != h.box.Generation:
				return false
			case e.box.State == through:
				e.box.State = from
			case e.was != through:
				return false
			case from == sandbox.StatePaused: // that is not lost with its node
				e.box.State, e.box.Reason, e.box.EndedAt, e.was = from, "", time.Time{}, ""
			default:
				e.was = from
			}
			return true
		})
	}
}

// onItsWay reports whether a state is one that passes by itself.
func onItsWay(s sandbox.State) bool {
	switch s {
	case sandbox.StateCreating, sandbox.StatePausing, sandbox.StateResuming, sandbox.StateMigrating:
		return true
	case sandbox.StateRunning, sandbox.StatePaused, sandbox.StateStopping, sandbox.StateStopped, sandbox.StateLost,
		sandbox.StateFailed, sandbox.StateDeleted:
	}
	return false
}

// kindToWire reads the kind of checkpoint that a request names; empty means memory. Errors: ErrInvalid.
func kindToWire(k sandbox.CheckpointKind) (agentv1.CheckpointKind, error) {
	switch k {
	case "", sandbox.CheckpointMemory:
		return agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY, nil
	case sandbox.CheckpointFiles:
		return agentv1.CheckpointKind_CHECKPOINT_KIND_FILES, nil
	}
	return 0, sandbox.Invalidf("kind %.40q: want memory or files", k)
}
