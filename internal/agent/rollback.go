package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// Rollback makes a sandbox, running or paused, go on from a checkpoint of itself.
func (a *Agent) Rollback(ctx context.Context, req *agentv1.RollbackRequest) (*agentv1.RollbackResponse, error) {
	a.followClock(ctx)
	in, err := a.visible(req.GetId())
	if err == nil {
		err = snapshot.CheckID(req.GetCheckpointId())
	}
	if err != nil {
		return nil, toWireError(err)
	}
	began := time.Now()
	err = a.rollback(ctx, in, req.GetCheckpointId(), req.GetPermitted())
	a.metrics.saved("rollback", err, began)
	if err != nil {
		a.log.WarnContext(ctx, "sandbox not rolled back", slog.String("op", "rollback"), slog.String("sandbox_id", string(in.id)),
			slog.Duration("after", time.Since(began)), slog.Any("err", err))
		return nil, toWireError(err)
	}
	a.log.InfoContext(ctx, "sandbox rolled back", slog.String("op", "rollback"), slog.String("sandbox_id", string(in.id)),
		slog.String("checkpoint_id", req.GetCheckpointId()), slog.Duration("after", time.Since(began)))
	r := in.record()
	return &agentv1.RollbackResponse{Sandbox: toWireSandbox(&r.Sandbox), Load: a.load()}, nil
}

func (a *Agent) rollback(ctx context.Context, in *instance, id string, permitted bool) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	from, err := a.saves.Hold(id)
	if err != nil {
		return err
	}
	defer from.Release()
	switch m := &from.Manifest; {
	case m.Pause:
		return sandbox.NotFoundf("checkpoint %s is not on this node", id)
	case m.SandboxID != in.id:
		return sandbox.Invalidf("checkpoint %s is not of sandbox %s: a sandbox can only be rolled back to a checkpoint of itself", id, in.id)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.PauseTimeout)
	defer cancel()
	switch r := in.record(); {
	case r.State == sandbox.StateRunning && in.alive():
		return a.rewindRunning(ctx, in, from)
	case r.State == sandbox.StatePaused && r.Guarded && !permitted:
		return errGuarded(&r)
	case r.State == sandbox.StatePaused:
		return a.rewindPaused(ctx, in, from)
	default:
		return in.unfit(&r)
	}
}

// rewindRunning rolls a running sandbox back. Until the journal has taken the checkpoint for the sandbox's own, the guest
// goes on after an error; from then on it goes, and the sandbox is restored, if need be by the reconcile loop.
//
// Preconditions: the caller holds in.op.
func (a *Agent) rewindRunning(ctx context.Context, in *instance, from *snapshot.Held) error {
	if err := a.putPausing(ctx, in, ""); err != nil {
		return err
	}
	r := in.record()
	m, err := a.linkCheckpoint(r.Checkpoint, from, true)
	if err == nil {
		r.Generation++
		r.PausedAt, r.PausedKind, r.PausedBytes = now(), m.Kind, m.Bytes
		r, err = a.journal.Rewind(ctx, r)
	}
	if err != nil {
		err = fmt.Errorf("roll sandbox %s back: %w", in.id, err)
		a.retryLater(ctx, in, a.unpause(ctx, in, err))
		return err
	}
	in.set(&r)
	if err := a.finishRewind(ctx, in); err != nil {
		a.retryLater(ctx, in, err)
		return fmt.Errorf("roll sandbox %s back: %w: it will be tried again: %w", in.id, sandbox.ErrUnavailable, err)
	}
	return nil
}

// finishRewind puts the guest that belongs to the checkpoint in the place of the one that does not.
//
// Preconditions: the caller holds in.op.
func (a *Agent) finishRewind(ctx context.Context, in *instance) error {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.CreateTimeout)
	defer cancel()
	if err := a.leave(ctx, in); err != nil {
		return err
	}
	if err := a.restore(ctx, in); err != nil {
		return err
	}
	return a.putRestored(ctx, in, in.record(), "rolled_back")
}

// rewindPaused makes a paused sandbox run from a checkpoint other than the one that it is paused in. After an error it is
// paused as before.
//
// Preconditions: the caller holds in.op.
func (a *Agent) rewindPaused(ctx context.Context, in *instance, from *snapshot.Held) error {
	if err := a.clearLeft(ctx, in); err != nil {
		return err
	}
	before := in.record()
	r := before
	r.Generation++
	r.Checkpoint = ownCheckpoint(&r)
	m, err := a.linkCheckpoint(r.Checkpoint, from, true)
	if err != nil {
		return fmt.Errorf("roll sandbox %s back: %w", in.id, err)
	}
	r.PausedKind, r.PausedBytes = m.Kind, m.Bytes
	if err := a.readmit(ctx, in, r); err != nil {
		a.dropLater(r.Checkpoint)
		return fmt.Errorf("roll sandbox %s back: %w", in.id, err)
	}
	err = a.restore(ctx, in)
	if err == nil {
		err = a.putRestored(ctx, in, afterPause(in.record(), now()), "rolled_back")
	}
	if err == nil {
		a.dropLater(before.Checkpoint)
		return nil
	}
	err = fmt.Errorf("roll sandbox %s back: %w", in.id, notOfTheCaller(err))
	back := in.record()
	back.Checkpoint, back.PausedKind, back.PausedBytes = before.Checkpoint, before.PausedKind, before.PausedBytes
	in.set(&back)
	a.retryLater(ctx, in, a.putBack(ctx, in, err))
	a.dropLater(r.Checkpoint)
	return err
}

// afterPause moves an end that passed while the sandbox was paused: it gets the time that it had left.
func afterPause(r journal.Record, at time.Time) journal.Record {
	if !r.EndAt.IsZero() && !r.EndAt.After(at) {
		r.EndAt = r.EndAt.Add(at.Sub(r.PausedAt))
	}
	return r
}
