package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// ConnectRequest says how a sandbox is to be made usable.
type ConnectRequest struct {
	// Timeout is how long it lives at least from now, or Never. One that is paused needs at least a second.
	Timeout time.Duration
	// Cold boots a paused sandbox anew from its files. It means nothing for one that runs.
	Cold bool
	// AutoPause, where it is set, says whether the timeout pauses it from now on.
	AutoPause *bool
}

// Connect returns a sandbox running: as it is, with its end only ever moved later, or resumed where it was paused, in
// which case resumed is true. It waits for a pause or a resume that is under way.
// Errors: ErrInvalid, ErrNotFound, ErrExhausted when its node has no room for it, ErrUnsupported for a cold boot of one
// whose memory was kept, ErrUnavailable.
func (c *Control) Connect(ctx context.Context, id sandbox.ID, req ConnectRequest) (box sandbox.Sandbox, resumed bool, err error) {
	h, err := c.holdFor(ctx, id, req)
	if err != nil {
		return sandbox.Sandbox{}, false, err
	}
	return c.resume(ctx, h, req)
}

// Resume makes a paused sandbox run again.
// Errors: those of Connect, and ErrConflict for one that runs.
func (c *Control) Resume(ctx context.Context, id sandbox.ID, req ConnectRequest) (sandbox.Sandbox, error) {
	h, err := c.holdFor(ctx, id, req)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if h.box.State == sandbox.StateRunning {
		if h.box, err = c.look(ctx, h); err != nil {
			return sandbox.Sandbox{}, err
		}
	}
	if h.box.State == sandbox.StateRunning {
		return sandbox.Sandbox{}, sandbox.Conflictf("sandbox %s is running: only a paused one can be resumed", id)
	}
	box, _, err := c.resume(ctx, h, req)
	return box, err
}

func (c *Control) holdFor(ctx context.Context, id sandbox.ID, req ConnectRequest) (held, error) {
	if req.Timeout != Never {
		if err := c.limits.checkTimeout(req.Timeout, 0); err != nil {
			return held{}, err
		}
	}
	h, err := c.hold(ctx, id)
	if err != nil {
		return held{}, err
	}
	if h.box.State != sandbox.StateRunning && req.Timeout != Never {
		return h, c.limits.checkTimeout(req.Timeout, time.Second)
	}
	return h, nil
}

func (c *Control) resume(ctx context.Context, h held, req ConnectRequest) (sandbox.Sandbox, bool, error) {
	id := h.box.ID
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	permitted, release, err := c.permit(ctx, &h)
	if err != nil {
		return sandbox.Sandbox{}, false, err
	}
	defer release()
	node := h.box.NodeID
	defer c.passing(h, sandbox.StatePaused, sandbox.StateResuming)()
	done := func(load *agentv1.Load) { c.fleet.answered(node, load) }
	if h.box.State == sandbox.StatePaused { // it takes room, as a create does
		done = c.fleet.dispatch(node, h.box.Resources)
	}
	var resp *agentv1.ResumeResponse
	err = c.settled(ctx, &h, func(ctx context.Context) (err error) {
		resp, err = h.agent.Resume(ctx, &agentv1.ResumeRequest{
			Id: string(id), Timeout: timeoutToWire(req.Timeout), ExtendOnly: true, Cold: req.Cold, AutoPause: req.AutoPause,
			Permitted: permitted,
		})
		return err
	})
	done(resp.GetLoad())
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Sandbox{}, false, unknown(id)
	}
	if err != nil {
		return sandbox.Sandbox{}, false, fmt.Errorf("connect to sandbox %s: %w", id, err)
	}
	box, err := c.learn(h.box.NodeID, resp.GetSandbox())
	return box, resp.GetResumed(), err
}
