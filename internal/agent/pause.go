package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// maxAutoPauses is how often the pause at a sandbox's end is tried before it is ended instead.
const maxAutoPauses = 3

// Pause saves a running sandbox and frees its processor time and memory.
func (a *Agent) Pause(ctx context.Context, req *agentv1.PauseRequest) (*agentv1.PauseResponse, error) {
	a.followClock(ctx)
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	if req.GetTimedOut() {
		if err := a.checkTime(ctx, in); err != nil {
			return nil, toWireError(err)
		}
	}
	if err := in.lock(ctx); err != nil {
		return nil, toWireError(err)
	}
	defer a.release(in)
	r := in.record()
	switch {
	case r.State == sandbox.StatePaused:
		return nil, toWireError(sandbox.Conflictf("sandbox %s is paused already", in.id))
	case r.State != sandbox.StateRunning || !in.alive():
		return nil, toWireError(in.unfit(&r))
	}
	if err := checkGeneration(&r.Sandbox, req.GetGeneration()); err != nil {
		return nil, toWireError(err)
	}
	if req.GetTimedOut() {
		if err := a.checkIdle(ctx, in); err != nil {
			return nil, toWireError(err)
		}
		if err = a.pauseOrEnd(ctx, in); err != nil && in.record().State == sandbox.StateStopping {
			a.retryLater(ctx, in, err)
		}
	} else {
		err = a.pause(ctx, in, fromWireKind(req.GetKind()), "")
	}
	if err != nil {
		return nil, toWireError(err)
	}
	r = in.record()
	return &agentv1.PauseResponse{Sandbox: toWireSandbox(&r.Sandbox), Load: a.load()}, nil
}

// pause takes a running sandbox to paused; once begun, it does not depend on the caller. After an error the sandbox runs,
// or is about to. The reason is empty where somebody asked for it.
//
// Until the journal says paused, the guest is there and decides: it goes on, and what was saved is deleted first. From then
// on the checkpoint decides, and whatever is left of the guest goes.
//
// Preconditions: the caller holds in.op.
func (a *Agent) pause(ctx context.Context, in *instance, kind sandbox.CheckpointKind, reason string) (err error) {
	began := time.Now()
	defer func() { a.metrics.saved("pause", err, began) }()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.PauseTimeout)
	defer cancel()
	if err := a.putPausing(ctx, in, reason); err != nil {
		return err
	}
	in.closeConns()
	m, err := a.saveHeld(ctx, in, engine.SaveSpec{Kind: engine.SaveKind(kind)})
	if err == nil {
		err = a.putPaused(ctx, in, &m, "sandbox paused")
	}
	if err != nil {
		err = fmt.Errorf("pause sandbox %s: %w", in.id, err)
		a.retryLater(ctx, in, a.unpause(ctx, in, err))
		return err
	}
	a.log.InfoContext(ctx, "sandbox paused", slog.String("op", "pause"), slog.String("sandbox_id", string(in.id)),
		slog.String("kind", string(kind)), slog.Int64("bytes", m.Bytes), slog.Duration("after", time.Since(began)))
	a.retryLater(ctx, in, a.leave(ctx, in))
	return nil
}

// saveHeld saves the guest and leaves it standing still, unless it or somebody ends that.
func (a *Agent) saveHeld(ctx context.Context, in *instance, spec engine.SaveSpec) (snapshot.Manifest, error) {
	ctx, done := in.interruptible(ctx)
	defer done()
	spec.Hold = true
	return a.saveCheckpoint(ctx, in, in.record().Checkpoint, spec)
}

// putPausing notes what the sandbox is going to be paused in, and why.
func (a *Agent) putPausing(ctx context.Context, in *instance, reason string) error {
	r := in.record()
	r.Reason = reason
	r.State, r.Deadline = sandbox.StatePausing, now().Add(a.cfg.PauseTimeout)
	r.Generation++
	r.Checkpoint = ownCheckpoint(&r)
	return a.put(ctx, in, r)
}

// putPaused makes the checkpoint count in place of the guest.
func (a *Agent) putPaused(ctx context.Context, in *instance, m *snapshot.Manifest, line string) error {
	r := in.record()
	r.State, r.Deadline, r.Network, r.Rewinding = sandbox.StatePaused, time.Time{}, journal.Network{}, false
	r.Checkpoint, r.PausedAt, r.PausedKind, r.PausedBytes = m.ID, now(), m.Kind, m.Bytes
	r.Generation++
	r.Append(journal.Line{Time: r.PausedAt, Level: "info", Message: line})
	return a.put(ctx, in, r, journal.Change{Type: "paused", Time: r.PausedAt, Sandbox: r.Sandbox})
}

// leave takes away the guest of a sandbox that is paused.
//
// Preconditions: the caller holds in.op.
func (a *Agent) leave(ctx context.Context, in *instance) error {
	in.renew()
	in.closeConns()
	err := a.halt(ctx, in)
	in.setLeft(err != nil)
	return err
}

// unpause makes a sandbox run again whose pause did not succeed. When it fails, the sandbox stays in pausing, and the
// reconcile loop tries again.
//
// Preconditions: the caller holds in.op.
func (a *Agent) unpause(ctx context.Context, in *instance, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.StopTimeout)
	defer cancel()
	r := in.record()
	// What the guest does from here on must not be undone by a restart that finds the checkpoint.
	if err := a.dropOwn(&r); err != nil {
		return err
	}
	err := a.engine.Thaw(ctx, in.id)
	if isNotFound(err) {
		return nil // it has ended, which whoever watches it takes from here
	}
	if err != nil {
		return fmt.Errorf("let sandbox %s go on: %w", in.id, err)
	}
	a.log.WarnContext(ctx, "sandbox not paused", slog.String("sandbox_id", string(in.id)), slog.Any("err", cause))
	r.State, r.Checkpoint, r.Deadline, r.Reason = sandbox.StateRunning, "", time.Time{}, ""
	r.Generation++
	r.Append(journal.Line{Time: now(), Level: "warn", Message: fmt.Sprintf("sandbox not paused, it goes on: %v", cause)})
	if err := a.put(ctx, in, r); err != nil {
		return err
	}
	in.reopen()
	return nil
}

// pauseAtEnd pauses a sandbox whose time is up, unless that was changed meanwhile.
//
// Preconditions: the caller holds in.op.
func (a *Agent) pauseAtEnd(ctx context.Context, in *instance) error {
	r := in.record()
	if r.State != sandbox.StateRunning || r.EndAt.IsZero() || r.EndAt.After(now()) || !in.alive() {
		return nil // moved or ended meanwhile
	}
	if err := a.pauseOrEnd(ctx, in); err != nil && in.record().State != sandbox.StateRunning {
		return err
	}
	return nil // it was paused, has ended, or is tried again
}

// pauseOrEnd pauses a sandbox whose time is up. When that cannot be done, again and again, the sandbox is ended, which is no
// error.
//
// Preconditions: the caller holds in.op.
func (a *Agent) pauseOrEnd(ctx context.Context, in *instance) error {
	r := in.record()
	err := a.pause(ctx, in, r.AutoPauseKind, endReason(&r))
	if err == nil || in.record().State != sandbox.StateRunning {
		return nil // what is left to do has been noted
	}
	if tries := in.pauseFailed(now()); tries < maxAutoPauses && !errors.Is(err, sandbox.ErrUnsupported) {
		return err
	}
	return a.end(ctx, in, timedOut(fmt.Sprintf("%s, and it could not be paused: %.*s", endReason(&r), maxReasonBytes, err.Error())))
}

// settlePausing ends a pause that nobody carries out any more.
//
// Preconditions: the caller holds in.op.
func (a *Agent) settlePausing(ctx context.Context, in *instance) error {
	err := a.unpause(ctx, in, sandbox.Unavailablef("the pause was given up"))
	if r := in.record(); err != nil && now().After(r.Deadline) {
		reason := fmt.Sprintf("it could neither be paused nor go on: %.*s", maxReasonBytes, err.Error())
		return a.end(ctx, in, journal.Ending{State: sandbox.StateFailed, Reason: reason, Type: "failed"})
	}
	return err
}

// reopen allows connections again, unless the guest has ended.
func (in *instance) reopen() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = in.exit != nil
}

// isLeft reports what setLeft noted.
func (in *instance) isLeft() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.left
}

// setLeft notes whether a paused or migrating sandbox has something left on the machine.
func (in *instance) setLeft(left bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.left = left
}

// pauseFailed counts a failed pause and puts the next one off.
func (in *instance) pauseFailed(at time.Time) int {
	in.failed(at.Add(time.Second))
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.tries
}
