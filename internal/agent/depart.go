package agent

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

const (
	// moveDeadline is when the server is reminded of a sandbox that still moves, unless it said otherwise.
	moveDeadline = 5 * time.Minute
	// maxGrace bounds how long a sandbox that is to move waits for its connections.
	maxGrace = 10 * time.Minute
)

// A sandbox that moves is migrating at both ends, and runs at neither. Which of them counts is for the server to say, which
// keeps that where it outlives a node: with Arrive or Return at the one, and Forget at the other. A node that was restarted
// keeps what it has and waits to be told.

// Depart has a sandbox move.
func (a *Agent) Depart(ctx context.Context, req *agentv1.DepartRequest) (*agentv1.DepartResponse, error) {
	a.followClock(ctx)
	in, err := a.movable(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	grace, err := fromWireWait(req.GetGrace(), 0, maxGrace)
	if err != nil {
		return nil, toWireError(err)
	}
	deadline, err := fromWireWait(req.GetDeadline(), moveDeadline, 24*time.Hour)
	if err != nil {
		return nil, toWireError(err)
	}
	if err := a.depart(ctx, in, grace, deadline); err != nil {
		a.log.WarnContext(ctx, "sandbox not departed", slog.String("op", "depart"), slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
		return nil, toWireError(err)
	}
	p, err := a.parcelOf(in)
	if err != nil {
		return nil, toWireError(err)
	}
	return &agentv1.DepartResponse{Parcel: p, Load: a.load()}, nil
}

// fromWireWait returns a time to wait, or the default where none is given.
func fromWireWait(d *durationpb.Duration, or, most time.Duration) (time.Duration, error) {
	if d == nil {
		return or, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, sandbox.Invalidf("wait: %v", err)
	}
	if t := d.AsDuration(); t >= 0 && t <= most {
		return t, nil
	}
	return 0, sandbox.Invalidf("wait of %v: want 0 to %v", d.AsDuration(), most)
}

// movable returns the sandbox with the id, and otherwise says why it is none that could move.
func (a *Agent) movable(text string) (*instance, error) {
	if in, ok := a.get(sandbox.ID(text)); ok {
		switch r := in.record(); {
		case r.BuildID != "":
			return nil, sandbox.Conflictf("sandbox %s is for build %s, and builds do not move: wait for its end, or cancel it", in.id, r.BuildID)
		case r.State == sandbox.StateCreating && !r.Warm:
			return nil, sandbox.Conflictf("sandbox %s is being created: try again in a moment", in.id)
		}
	}
	return a.visible(text)
}

func (a *Agent) depart(ctx context.Context, in *instance, grace, deadline time.Duration) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	switch r := in.record(); {
	case r.State == sandbox.StateMigrating && !r.Received:
		return nil // asked again
	case r.State == sandbox.StatePaused:
		return a.departPaused(ctx, in, deadline)
	case r.State != sandbox.StateRunning || !in.alive():
		return in.unfit(&r)
	case !slices.Contains(a.engine.Caps().Capabilities, "save_memory"):
		return sandbox.Unsupportedf("sandbox %s cannot move while it runs: engine %s cannot save memory", in.id, a.engine.Caps().Name)
	}
	if err := in.emptied(ctx, grace); err != nil {
		return err
	}
	return a.departRunning(ctx, in, deadline)
}

// departPaused marks a paused sandbox as one that moves.
//
// Preconditions: the caller holds in.op.
func (a *Agent) departPaused(ctx context.Context, in *instance, deadline time.Duration) error {
	if err := a.clearLeft(ctx, in); err != nil {
		return err
	}
	m, err := a.saves.Get(in.record().Checkpoint)
	if err != nil {
		return notOfTheCaller(err)
	}
	return a.putDeparted(ctx, in, &m, deadline)
}

// departRunning marks a running sandbox as one that moves. Its guest goes on, with nobody connected, until the other node begins
// to get it.
//
// Preconditions: the caller holds in.op.
func (a *Agent) departRunning(ctx context.Context, in *instance, deadline time.Duration) error {
	defer in.setDeparting(false)
	in.closeConns()
	err := a.putDeparted(context.WithoutCancel(ctx), in, nil, deadline)
	if err != nil {
		in.reopen()
		return fmt.Errorf("move sandbox %s: %w", in.id, err)
	}
	a.log.InfoContext(ctx, "sandbox departed", slog.String("op", "depart"), slog.String("sandbox_id", string(in.id)))
	return nil
}

// putDeparted makes a sandbox one that moves in a checkpoint, or without one with its guest.
func (a *Agent) putDeparted(ctx context.Context, in *instance, m *snapshot.Manifest, deadline time.Duration) error {
	r, at := in.record(), now()
	r.State, r.Deadline, r.Runs = sandbox.StateMigrating, at.Add(deadline), m == nil
	if m != nil {
		r.Network, r.Checkpoint, r.PausedKind, r.PausedBytes = journal.Network{}, m.ID, m.Kind, m.Bytes
	}
	r.Generation++
	r.Append(journal.Line{Time: at, Level: "info", Message: "sandbox is moved to another node"})
	return a.put(ctx, in, r, journal.Change{Type: "departed", Time: at, Sandbox: r.Sandbox})
}

// emptied lets nobody connect to a sandbox any more and waits for the connections that there are; at the end of the grace it
// waits no longer. After an error, the end of the sandbox or of ctx, it can be connected to as before.
//
// Preconditions: the caller holds in.op.
func (in *instance) emptied(ctx context.Context, grace time.Duration) error {
	in.setDeparting(true)
	ctx, done := in.interruptible(ctx)
	defer done()
	timer := time.NewTimer(grace)
	defer timer.Stop()
	for in.connected() {
		select {
		case <-in.quiet:
		case <-timer.C:
			return nil
		case <-ctx.Done():
			in.setDeparting(false)
			return fmt.Errorf("wait for the connections of sandbox %s: %w", in.id, context.Cause(ctx))
		}
	}
	return nil
}

// connected reports whether somebody has a connection into the sandbox.
func (in *instance) connected() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.conns) > 0
}

func (in *instance) setDeparting(departing bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.departing = departing
}
