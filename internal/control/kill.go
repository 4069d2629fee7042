package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const killReason = "killed on request"

// Kill ends a sandbox. One that has failed or is lost is cleared away, and found no more. Errors: ErrNotFound.
func (c *Control) Kill(ctx context.Context, id sandbox.ID) error {
	box, err := c.Get(ctx, id)
	if err != nil {
		return err
	}
	err = c.killAt(ctx, box.NodeID, id)
	switch {
	case errors.Is(err, sandbox.ErrNotFound) && box.State.Ended():
		c.endsHere(id, killReason)
		return nil
	case errors.Is(err, sandbox.ErrNotFound):
		c.endsHere(id, "its node no longer has it")
		return unknown(id)
	case err != nil:
		return fmt.Errorf("kill sandbox %s: %w", id, err)
	}
	c.index.change(id, time.Now(), func(e *entry) bool {
		e.final = true
		if e.box.State == sandbox.StateDeleted {
			return true // the node's report was faster
		}
		e.box.Generation++
		e.box.State, e.box.Reason, e.box.EndedAt = sandbox.StateDeleted, killReason, time.Now()
		return true
	})
	return nil
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
