package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// SetTimeout moves a sandbox's end to the given time from now, or to Never; 0 ends it at once.
// Errors: ErrInvalid, ErrNotFound, ErrConflict for one that is paused.
func (c *Control) SetTimeout(ctx context.Context, id sandbox.ID, timeout time.Duration) (sandbox.Sandbox, error) {
	return c.moveEnd(ctx, id, timeout, false)
}

// Extend is SetTimeout that only ever moves the end later.
func (c *Control) Extend(ctx context.Context, id sandbox.ID, timeout time.Duration) (sandbox.Sandbox, error) {
	return c.moveEnd(ctx, id, timeout, true)
}

func (c *Control) moveEnd(ctx context.Context, id sandbox.ID, timeout time.Duration, extend bool) (sandbox.Sandbox, error) {
	if timeout != Never {
		if err := c.limits.checkTimeout(timeout, 0); err != nil {
			return sandbox.Sandbox{}, err
		}
	}
	h, err := c.hold(ctx, id)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if h.box.State == sandbox.StatePaused {
		return sandbox.Sandbox{}, sandbox.Conflictf("sandbox %s is paused and has no end until it is resumed: connect to it with a timeout instead", id)
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	var resp *agentv1.SetTimeoutResponse
	err = c.settled(ctx, &h, func(ctx context.Context) (err error) {
		resp, err = h.agent.SetTimeout(ctx, &agentv1.SetTimeoutRequest{
			Id: string(id), Timeout: timeoutToWire(timeout), ExtendOnly: extend,
		})
		return err
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Sandbox{}, unknown(id)
	}
	if err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("set the timeout of sandbox %s: %w", id, err)
	}
	return c.learn(h.box.NodeID, resp.GetSandbox())
}

// live returns a sandbox that has not ended. One that has failed or is lost is ErrNotFound too, with the reason: there
// is nothing left that could be used.
func (c *Control) live(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	box, err := c.Get(ctx, id)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if box.State == sandbox.StateLost && (c.fleet.isDown(box.NodeID) || c.index.mayReturn(id)) {
		return sandbox.Sandbox{}, c.away(box)
	}
	if box.State.Ended() {
		return sandbox.Sandbox{}, sandbox.NotFoundf("sandbox %s has ended (%s): %s", id, box.State, box.Reason)
	}
	return box, nil
}
