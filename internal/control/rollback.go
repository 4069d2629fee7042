package control

import (
	"context"
	"fmt"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Rollback makes a sandbox, running or paused, go on from one of its own snapshots. Its id and its end stay.
// Errors: ErrInvalid, ErrNotFound for the sandbox or the snapshot, ErrConflict for a snapshot of another sandbox,
// ErrExhausted when its node has no room for it, ErrUnavailable.
func (c *Control) Rollback(ctx context.Context, id sandbox.ID, snapshot string) (sandbox.Sandbox, error) {
	h, err := c.hold(ctx, id)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if snapshot == "" {
		return sandbox.Sandbox{}, sandbox.Invalidf("snapshot is missing: want the id of one of the sandbox's own snapshots")
	}
	t, b, err := c.resolveBuild(ctx, snapshot)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if t.Kind != sandbox.TemplateSnapshot || b.Source != string(id) {
		return sandbox.Sandbox{}, sandbox.Conflictf("%.80q is no snapshot of sandbox %s: a sandbox can only be rolled back to its own", snapshot, id)
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	permitted, release, err := c.permit(ctx, &h)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	defer release()
	var resp *agentv1.RollbackResponse
	err = c.settled(ctx, &h, func(ctx context.Context) (err error) {
		resp, err = h.agent.Rollback(ctx, &agentv1.RollbackRequest{Id: string(id), CheckpointId: b.ID, Permitted: permitted})
		return err
	})
	if err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("roll sandbox %s back to %s: %w", id, snapshot, err)
	}
	c.fleet.answered(h.box.NodeID, resp.GetLoad())
	return c.learn(h.box.NodeID, resp.GetSandbox())
}
