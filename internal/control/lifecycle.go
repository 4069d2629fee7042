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

// hold finds a sandbox that has not ended, and its node. Errors: ErrNotFound, ErrUnavailable.
func (c *Control) hold(ctx context.Context, id sandbox.ID) (held, error) {
	box, err := c.live(ctx, id)
	if err != nil {
		return held{}, err
	}
	agent, err := c.agent(box.NodeID)
	return held{box: box, agent: agent}, err
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
// state to another: whether the command is possible is only known once it has arrived.
func (c *Control) settled(ctx context.Context, h held, command func(context.Context) error) error {
	for {
		err := fromNode(h.box.NodeID, command(ctx))
		if !errors.Is(err, sandbox.ErrConflict) {
			return err
		}
		box, lookErr := c.look(ctx, h)
		if lookErr != nil || !onItsWay(box.State) {
			return err
		}
		if pause(ctx, settleInterval); ctx.Err() != nil {
			return err
		}
	}
}

// passing has the index say, until the returned function is called or the node says more, that a sandbox is on its way:
// nodes do not report states that last for milliseconds, and traffic should not try its luck meanwhile.
func (c *Control) passing(h held, from, through sandbox.State) (done func()) {
	turn := func(a, b sandbox.State) func() {
		return func() {
			c.index.change(h.box.ID, time.Now(), func(e *entry) bool {
				if e.box.State != a || e.box.Generation != h.box.Generation {
					return false
				}
				e.box.State = b
				return true
			})
		}
	}
	turn(from, through)()
	return turn(through, from)
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
