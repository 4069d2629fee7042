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
	if r := in.record(); stands(&r) {
		in.interrupt(sandbox.Unavailablef("sandbox %s goes on at node %s", in.id, a.node))
	}
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
	return a.goOn(ctx, in, "returned")
}

// goOn ends a move here: the sandbox is what it was when it departed, or what its end makes of it if that has come meanwhile.
// Once begun, it does not depend on the caller. After an error it is migrating as before; of a received one that was to run
// nothing is left, since what it has done here must not count.
//
// Preconditions: the caller holds in.op.
func (a *Agent) goOn(ctx context.Context, in *instance, change string) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.CreateTimeout)
	defer cancel()
	r := in.record()
	received := r.Received
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
	err := a.proceed(ctx, in)
	if err == nil {
		r.Runs, r.Received = false, false
		in.reopen()
		err = a.putRestored(ctx, in, r, change)
	}
	a.metrics.saved(change, err, began)
	switch {
	case err != nil && received:
		a.retryLater(ctx, in, a.dropCopy(ctx, in))
	case isNotFound(err):
		return a.lose(ctx, in, "the sandbox's process ended while it moved")
	}
	if err != nil {
		return fmt.Errorf("go on with sandbox %s: %w", in.id, notOfTheCaller(err))
	}
	a.log.InfoContext(ctx, "sandbox moved", slog.String("op", change), slog.String("sandbox_id", string(in.id)), slog.Duration("after", time.Since(began)))
	return nil
}

// takeBack takes away what is left of the guest and the network of a sandbox that moves in a checkpoint, or is paused next.
//
// Preconditions: the caller holds in.op.
func (a *Agent) takeBack(ctx context.Context, in *instance) error {
	err := a.leave(context.WithoutCancel(ctx), in)
	if err == nil {
		in.setNetwork(journal.Network{})
	}
	return err
}

// putStill ends a move here with a sandbox that is paused. One that moved with its guest is saved for that; until the journal says
// that it is paused, the guest decides.
func (a *Agent) putStill(ctx context.Context, in *instance, r journal.Record, change string) (err error) {
	if stands(&r) {
		if r, err = a.saveStanding(ctx, in, r); err != nil {
			return err
		}
		r.PausedAt = now()
		defer func() {
			if err == nil {
				a.retryLater(ctx, in, a.leave(ctx, in))
			}
		}()
	} else if err := a.takeBack(ctx, in); err != nil {
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
func (a *Agent) recoverMoving(ctx context.Context, in *instance, running bool) error {
	r := in.record()
	if r.Received && r.Last.Sequence == 0 {
		return a.unreceive(ctx, in) // nobody was told of it
	}
	if stands(&r) {
		return a.recoverStanding(ctx, in, running)
	}
	if err := a.takeBack(ctx, in); err != nil {
		return err
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
