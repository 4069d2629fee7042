package control

import (
	"context"
	"errors"
	"fmt"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Pause saves a sandbox and gives back the processor time and memory that it holds; it returns when that is done.
// Errors: ErrNotFound, ErrConflict for one that is paused already, ErrInvalid for an unknown kind, ErrUnavailable.
func (c *Control) Pause(ctx context.Context, id sandbox.ID, kind sandbox.CheckpointKind) (sandbox.Sandbox, error) {
	keep, err := kindToWire(kind)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	h, err := c.hold(ctx, id)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	defer c.passing(h, sandbox.StateRunning, sandbox.StatePausing)()
	var resp *agentv1.PauseResponse
	err = c.settled(ctx, &h, func(ctx context.Context) (err error) {
		resp, err = h.agent.Pause(ctx, &agentv1.PauseRequest{Id: string(id), Kind: keep})
		return err
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Sandbox{}, unknown(id)
	}
	if err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("pause sandbox %s: %w", id, err)
	}
	c.fleet.answered(h.box.NodeID, resp.GetLoad())
	return c.learn(h.box.NodeID, resp.GetSandbox())
}
