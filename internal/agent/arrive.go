package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Arrive makes a received sandbox count.
func (a *Agent) Arrive(ctx context.Context, req *agentv1.ArriveRequest) (*agentv1.ArriveResponse, error) {
	a.followClock(ctx)
	in, err := a.visible(req.GetId())
	if err == nil {
		err = a.arrive(ctx, in, req.GetGeneration(), req.GetPaused())
	}
	if err != nil {
		a.log.WarnContext(ctx, "sandbox not arrived", slog.String("op", "arrive"), slog.String("sandbox_id", req.GetId()), slog.Any("err", err))
		return nil, toWireError(err)
	}
	r := in.record()
	return &agentv1.ArriveResponse{Sandbox: toWireSandbox(&r.Sandbox), Load: a.load()}, nil
}

func (a *Agent) errForgotten(in *instance) error {
	return sandbox.NotFoundf("sandbox %s is not on node %s any more", in.id, a.node)
}

func (a *Agent) arrive(ctx context.Context, in *instance, generation int64, paused bool) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	r := in.record()
	moving := r.State == sandbox.StateMigrating
	switch {
	case !moving && r.Generation > generation && !r.State.Ended():
		return nil // asked again
	case !a.has(in):
		return a.errForgotten(in)
	case !moving || !r.Received:
		return in.unfit(&r)
	case r.Generation != generation:
		return otherGeneration(&r.Sandbox, generation)
	}
	if paused {
		r.Runs = false
		return a.putStill(ctx, in, r, "arrived")
	}
	return a.goOn(ctx, in, "arrived")
}

// Return lets a departed sandbox go on here.
func (a *Agent) Return(ctx context.Context, req *agentv1.ReturnRequest) (*agentv1.ReturnResponse, error) {
	a.followClock(ctx)
	in, err := a.visible(req.GetId())
	if err == nil {
		err = a.comeBack(ctx, in, req.GetGeneration())
	}
	if err != nil {
		return nil, toWireError(err)
	}
	r := in.record()
	return &agentv1.ReturnResponse{Sandbox: toWireSandbox(&r.Sandbox), Load: a.load()}, nil
}

func (a *Agent) comeBack(ctx context.Context, in *instance, generation int64) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	r := in.record()
	switch {
	case !a.has(in):
		return a.errForgotten(in)
	case r.State.Ended():
		return in.unfit(&r)
	case r.State != sandbox.StateMigrating && r.Generation >= generation:
		return nil // asked again
	case r.State != sandbox.StateMigrating:
		return otherGeneration(&r.Sandbox, generation)
	case r.Received:
		return sandbox.Conflictf("sandbox %s came to node %s from another: it arrives here, or is forgotten", in.id, a.node)
	case generation > 0 && generation <= r.Generation:
		return otherGeneration(&r.Sandbox, generation)
	}
	if generation > 0 {
		r.Generation = generation - 1 // what follows adds the rest
		in.set(&r)
	}
	err := a.goOn(ctx, in, "returned")
	if now := in.record(); err == nil || now.State != sandbox.StateMigrating {
		return err
	}
	a.log.WarnContext(ctx, "sandbox not restored: it is paused", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
	r = in.record()
	r.Runs = false
	r.Append(journal.Line{Time: now(), Level: "warn", Message: fmt.Sprintf("sandbox not resumed, it is paused: %v", err)})
	return a.putStill(context.WithoutCancel(ctx), in, r, "returned")
}

// goOn ends a move here: the sandbox is what it was when it departed, or what its end makes of it if that has come meanwhile.
// Once begun, it does not depend on the caller. After an error it is migrating as before.
//
// Preconditions: the caller holds in.op.
func (a *Agent) goOn(ctx context.Context, in *instance, change string) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.CreateTimeout)
	defer cancel()
	r := in.record()
	switch over := !r.EndAt.IsZero() && !r.EndAt.After(now()) && !r.IdleTimeout; {
	case !r.Runs:
		return a.putStill(ctx, in, r, change)
	case over && r.AutoPause:
		r.Runs = false
		return a.putStill(ctx, in, r, change)
	case over:
		r.Received = false
		in.set(&r)
		return a.end(ctx, in, timedOut(endReason(&r)))
	}
	if in.isLeft() {
		if err := a.takeBack(ctx, in); err != nil {
			return err
		}
	}
	err := a.restore(ctx, in)
	if err == nil {
		r = in.record()
		r.Runs, r.Received = false, false
		err = a.putRestored(ctx, in, r, change)
	}
	a.metrics.saved(change, err, began)
	if err != nil {
		a.retryLater(ctx, in, a.takeBack(ctx, in))
		return fmt.Errorf("go on with sandbox %s: %w", in.id, notOfTheCaller(err))
	}
	a.log.InfoContext(ctx, "sandbox moved", slog.String("op", change), slog.String("sandbox_id", string(in.id)), slog.Duration("after", time.Since(began)))
	return nil
}

// takeBack takes away the guest and the network of a sandbox that is to stay migrating, or is paused next.
//
// Preconditions: the caller holds in.op.
func (a *Agent) takeBack(ctx context.Context, in *instance) error {
	err := a.leave(context.WithoutCancel(ctx), in)
	if err == nil {
		in.setNetwork(journal.Network{})
	}
	return err
}

// putStill ends a move here with a sandbox that is paused.
func (a *Agent) putStill(ctx context.Context, in *instance, r journal.Record, change string) error {
	if err := a.takeBack(ctx, in); err != nil {
		return err
	}
	if err := a.saves.Flush(r.Checkpoint); err != nil { // as long as it moved, nobody was promised that it outlives the power
		return err
	}
	r.State, r.Received, r.Runs, r.Deadline, r.Network = sandbox.StatePaused, false, false, time.Time{}, journal.Network{}
	r.Generation++
	r.Append(journal.Line{Time: now(), Level: "info", Message: ranAgain[change]})
	return a.put(ctx, in, r, journal.Change{Type: change, Time: now(), Sandbox: r.Sandbox})
}

// recoverMoving takes back a sandbox that moved when the process before ended. Whether it counts here is not for this node to
// say.
//
// Preconditions: the caller holds in.op.
func (a *Agent) recoverMoving(ctx context.Context, in *instance) error {
	if err := a.takeBack(ctx, in); err != nil {
		return err
	}
	r := in.record()
	if r.Received && r.Last.Sequence == 0 {
		return a.unreceive(ctx, in) // nobody was told of it
	}
	_, err := a.saves.Get(r.Checkpoint)
	switch {
	case err == nil:
		return nil
	case r.Received: // the node that it came from has it
		return a.dropCopy(ctx, in)
	}
	return a.lose(ctx, in, fmt.Sprintf("what the sandbox was saved in for its move is gone or damaged: %v", err))
}

// remind tells the server once more of a sandbox that still moves though its deadline has passed.
//
// Preconditions: the caller holds in.op.
func (a *Agent) remind(ctx context.Context, in *instance) error {
	r, at := in.record(), now()
	if r.State != sandbox.StateMigrating || r.Deadline.After(at) {
		return nil
	}
	r.Deadline = at.Add(moveDeadline)
	change := "departed"
	if r.Received {
		change = "received"
	}
	a.log.WarnContext(ctx, "sandbox still moves, nobody has said where to", slog.String("sandbox_id", string(in.id)), slog.Bool("received", r.Received))
	return a.put(ctx, in, r, journal.Change{Type: change, Time: at, Sandbox: r.Sandbox})
}

// settleMoving clears away what is left of the guest of a sandbox that moves, and reminds the server where it is time.
//
// Preconditions: the caller holds in.op.
func (a *Agent) settleMoving(ctx context.Context, in *instance) error {
	if in.isLeft() {
		if err := a.takeBack(ctx, in); err != nil {
			return err
		}
	}
	if r := in.record(); r.Received && r.Last.Sequence == 0 {
		return a.unreceive(ctx, in)
	}
	return a.remind(ctx, in)
}
