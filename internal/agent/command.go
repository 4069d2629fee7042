package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const maxReasonBytes = 500

func isNotFound(err error) bool { return errors.Is(err, sandbox.ErrNotFound) }

// Get returns a sandbox, also one that ended lately.
func (a *Agent) Get(_ context.Context, req *agentv1.GetRequest) (*agentv1.GetResponse, error) {
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	r := in.record()
	return &agentv1.GetResponse{Sandbox: toWireSandbox(&r.Sandbox)}, nil
}

// Kill ends a sandbox and frees what it held.
func (a *Agent) Kill(ctx context.Context, req *agentv1.KillRequest) (*agentv1.KillResponse, error) {
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	reason := req.GetReason()
	if reason == "" {
		reason = "killed by request"
	}
	e := journal.Ending{State: sandbox.StateDeleted, Reason: fmt.Sprintf("%.*s", maxReasonBytes, reason), Type: "killed"}
	if req.GetTimedOut() {
		e.Type = "timed_out"
		if err := errors.Join(a.checkTime(ctx, in), a.checkIdle(ctx, in)); err != nil {
			return nil, toWireError(err)
		}
	}
	if err := a.kill(ctx, in, e, req.GetGeneration()); err != nil {
		return nil, toWireError(err)
	}
	return &agentv1.KillResponse{}, nil
}

// kill ends a sandbox. One that has ended, or is about to for another reason, is ErrNotFound; one that moves, or that is not of
// the generation that is meant, is ErrConflict.
func (a *Agent) kill(ctx context.Context, in *instance, e journal.Ending, generation int64) error {
	if generation == 0 && in.transient() {
		in.interrupt(sandbox.Unavailablef("sandbox %s is being ended: %s", in.id, e.Reason))
	}
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	r := in.record()
	if r.State.Ended() {
		return errors.Join(sandbox.NotFoundf("sandbox %s is %s: %s", in.id, r.State, ending(&r)), a.clearAway(ctx, in, r, e))
	}
	if r.State == sandbox.StateMigrating {
		return in.unfit(&r)
	}
	if err := checkGeneration(&r.Sandbox, generation); err != nil {
		return err
	}
	if err := a.end(ctx, in, e); err != nil {
		a.retryLater(ctx, in, err)
		return fmt.Errorf("end sandbox %s: %w: it will be tried again: %w", in.id, sandbox.ErrUnavailable, err)
	}
	return nil
}

// clearAway notes of a sandbox that has ended by itself that somebody has seen that: no server lists it again.
//
// Preconditions: the caller holds in.op.
func (a *Agent) clearAway(ctx context.Context, in *instance, r journal.Record, e journal.Ending) error {
	if r.State == sandbox.StateDeleted || !a.has(in) {
		return nil
	}
	r.State, r.Reason = e.State, e.Reason
	r.Generation++
	err := a.put(ctx, in, r, journal.Change{Type: e.Type, Time: now(), Sandbox: r.Sandbox})
	if isNotFound(err) { // forgotten just now
		return nil
	}
	return err
}

// SetTimeout moves the end of a sandbox.
func (a *Agent) SetTimeout(ctx context.Context, req *agentv1.SetTimeoutRequest) (*agentv1.SetTimeoutResponse, error) {
	a.followClock(ctx)
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	t := term{forever: req.GetTimeout() == nil, extendOnly: req.GetExtendOnly(), generation: req.GetGeneration()}
	if !t.forever {
		if t.timeout, err = fromWireTimeout(req.GetTimeout()); err != nil {
			return nil, toWireError(err)
		}
	}
	if err := a.setEnd(ctx, in, &t); err != nil {
		return nil, toWireError(err)
	}
	r := in.record()
	return &agentv1.SetTimeoutResponse{Sandbox: toWireSandbox(&r.Sandbox)}, nil
}

// term is for how long a sandbox is to go on.
type term struct {
	timeout    time.Duration
	forever    bool
	extendOnly bool
	generation int64 // 0 means any
}

// end returns when a sandbox that has the term from at on is to end; zero means never.
func (t *term) end(at time.Time) time.Time {
	if t.forever {
		return time.Time{}
	}
	return at.Add(t.timeout)
}

func (a *Agent) setEnd(ctx context.Context, in *instance, t *term) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	r, end := in.record(), t.end(now())
	switch {
	case r.State == sandbox.StateMigrating:
		return in.unfit(&r)
	case r.State != sandbox.StateRunning || !in.alive():
		return sandbox.NotFoundf("sandbox %s is %s: %s", in.id, r.State, ending(&r))
	}
	if err := checkGeneration(&r.Sandbox, t.generation); err != nil {
		return err
	}
	if r.EndAt.Equal(end) || t.extendOnly && !later(end, r.EndAt) {
		return nil
	}
	atOnce := t.timeout == 0 && !t.forever
	in.setAtOnce(atOnce)
	if r.EndAt = end; !atOnce { // where it is paused and resumed, it goes on for as long as it was given before
		r.Timeout = t.timeout
	}
	r.Generation++
	return a.put(ctx, in, r, journal.Change{Type: "timeout_set", Time: now(), Sandbox: r.Sandbox})
}

// later reports whether the end x comes after the end y, zero being never.
func later(x, y time.Time) bool {
	if x.IsZero() || y.IsZero() {
		return x.IsZero() && !y.IsZero()
	}
	return x.After(y)
}
