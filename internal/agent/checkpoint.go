package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// saveCheckpoint saves a sandbox as a checkpoint, which counts when this returns without error. The spec's directory is found
// here. With Hold the guest then stands still until Thaw or Stop; after an error from the engine it goes on, after another it
// may stand still.
//
// Preconditions: the caller holds in.op.
func (a *Agent) saveCheckpoint(ctx context.Context, in *instance, id string, spec engine.SaveSpec) (snapshot.Manifest, error) {
	st, err := a.saves.Begin(id)
	if err != nil {
		return snapshot.Manifest{}, err
	}
	spec.Dir = st.Dir()
	saved, err := a.engine.Save(ctx, in.id, spec)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause // says who ended it, and why
		}
		return snapshot.Manifest{}, errors.Join(fmt.Errorf("save sandbox %s: %w", in.id, err), st.Discard())
	}
	r := in.record()
	m := manifestOf(&r, sandbox.CheckpointKind(spec.Kind))
	m.Pause = r.Checkpoint == id
	m.Bytes, m.MemoryBytes = saved.Bytes, saved.MemoryBytes
	return a.saves.Commit(st, m)
}

// manifestOf describes a checkpoint of a sandbox.
func manifestOf(r *journal.Record, kind sandbox.CheckpointKind) snapshot.Manifest {
	m := snapshot.Manifest{
		Kind: kind, ImageDigest: r.ImageDigest, Resources: r.Resources, SandboxID: r.ID, Secure: r.Secure, Guest: r.Guest, CreatedAt: now(),
	}
	if r.BuildID != "" {
		m.SandboxID, m.Secure = "", false
	}
	return m
}

// linkCheckpoint makes a checkpoint of the files of another one.
func (a *Agent) linkCheckpoint(id string, from *snapshot.Held, pause bool) (snapshot.Manifest, error) {
	st, err := a.saves.Begin(id)
	if err != nil {
		return snapshot.Manifest{}, err
	}
	if err := st.LinkFrom(from); err != nil {
		return snapshot.Manifest{}, errors.Join(err, st.Discard())
	}
	m := from.Manifest
	m.Pause, m.CreatedAt = pause, now()
	return a.saves.Commit(st, m)
}

// ownCheckpoint names the checkpoint that a sandbox is to be paused in; no two of its pauses have the same.
func ownCheckpoint(r *journal.Record) string {
	return "pause-" + string(r.ID) + "-" + strconv.FormatInt(r.Generation, 10)
}

// dropOwn deletes what a sandbox is paused in, if it is.
func (a *Agent) dropOwn(r *journal.Record) error {
	if r.Checkpoint == "" {
		return nil
	}
	if err := a.saves.Remove(r.Checkpoint); err != nil {
		return fmt.Errorf("delete what sandbox %s was paused in: %w", r.ID, err)
	}
	return nil
}

// dropLater deletes a checkpoint that no record names any more, without anybody waiting for it. Should the process end
// before, the next one does it.
func (a *Agent) dropLater(id string) {
	if id == "" {
		return
	}
	a.crew.run(func(ctx context.Context) {
		if err := a.saves.Remove(id); err != nil {
			a.log.WarnContext(ctx, "checkpoint not deleted", slog.String("checkpoint_id", id), slog.Any("err", err))
		}
		a.poke() // an image may have lost its last user
	})
}

// sourceOf returns the checkpoint that sandboxes of a kind go on from; the zero manifest where they are started from an image.
func (a *Agent) sourceOf(k poolKey) (snapshot.Manifest, error) {
	if k.checkpoint == "" {
		return snapshot.Manifest{}, nil
	}
	m, err := a.saves.Get(k.checkpoint)
	switch {
	case err != nil:
		return m, err
	case m.Pause:
		return m, sandbox.NotFoundf("checkpoint %s is not on this node", k.checkpoint)
	case m.ImageDigest != k.digest:
		return m, sandbox.Invalidf("checkpoint %s is of a sandbox that ran from image %s, not from %s", k.checkpoint, m.ImageDigest, k.digest)
	case m.Resources != k.size && m.Kind == sandbox.CheckpointMemory:
		return m, sandbox.Invalidf("checkpoint %s was made with resources %+v and can only go on with them: got %+v",
			k.checkpoint, m.Resources, k.size)
	}
	return m, nil
}

// holdSource returns the checkpoint that a guest is to go on from, to be released; one with an empty Dir where there is none.
func (a *Agent) holdSource(r *journal.Record) (*snapshot.Held, error) {
	id := r.Source
	if r.State == sandbox.StateResuming || r.State == sandbox.StateMigrating {
		id = r.Checkpoint
	}
	if id == "" {
		return snapshot.Nothing(), nil
	}
	return a.saves.Hold(id)
}

// Snapshot saves a sandbox, which goes on, as a checkpoint.
func (a *Agent) Snapshot(ctx context.Context, req *agentv1.SnapshotRequest) (*agentv1.SnapshotResponse, error) {
	in, err := a.visible(req.GetId())
	if err == nil {
		err = snapshot.CheckID(req.GetCheckpointId())
	}
	if err != nil {
		return nil, toWireError(err)
	}
	began := time.Now()
	m, err := a.snapshot(ctx, in, req.GetCheckpointId(), fromWireKind(req.GetKind()))
	a.metrics.saved("snapshot", err, began)
	if err != nil {
		a.log.WarnContext(ctx, "sandbox not saved", slog.String("op", "snapshot"), slog.String("sandbox_id", string(in.id)),
			slog.Duration("after", time.Since(began)), slog.Any("err", err))
		return nil, toWireError(err)
	}
	a.log.InfoContext(ctx, "sandbox saved", slog.String("op", "snapshot"), slog.String("sandbox_id", string(in.id)),
		slog.String("checkpoint_id", m.ID), slog.Int64("bytes", m.Bytes), slog.Duration("after", time.Since(began)))
	return &agentv1.SnapshotResponse{Checkpoint: toWireCheckpoint(&m)}, nil
}

func (a *Agent) snapshot(ctx context.Context, in *instance, id string, kind sandbox.CheckpointKind) (snapshot.Manifest, error) {
	if err := in.lock(ctx); err != nil {
		return snapshot.Manifest{}, err
	}
	defer a.release(in)
	var m snapshot.Manifest
	var err error
	switch r := in.record(); {
	case r.State == sandbox.StatePaused:
		m, err = a.snapshotPaused(&r, id, kind)
	case r.State == sandbox.StateRunning && in.alive():
		m, err = a.snapshotRunning(ctx, in, id, kind)
	default:
		err = in.unfit(&r)
	}
	if err != nil {
		return m, err
	}
	r := in.record()
	r.Append(journal.Line{Time: m.CreatedAt, Level: "info", Message: "sandbox saved as checkpoint " + id})
	err = a.put(ctx, in, r, journal.Change{Type: "snapshotted", Time: m.CreatedAt, Sandbox: r.Sandbox})
	if err != nil {
		return m, errors.Join(err, a.saves.Remove(id))
	}
	return m, nil
}

func (a *Agent) snapshotRunning(ctx context.Context, in *instance, id string, kind sandbox.CheckpointKind) (snapshot.Manifest, error) {
	ctx, done := in.interruptible(ctx)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, a.cfg.PauseTimeout)
	defer cancel()
	return a.saveCheckpoint(ctx, in, id, engine.SaveSpec{Kind: engine.SaveKind(kind)})
}

// snapshotPaused makes a checkpoint of what a sandbox is paused in. Where that is files alone, so is the checkpoint.
func (a *Agent) snapshotPaused(r *journal.Record, id string, kind sandbox.CheckpointKind) (snapshot.Manifest, error) {
	if kind == sandbox.CheckpointFiles && r.PausedKind != kind {
		return snapshot.Manifest{}, sandbox.Unsupportedf("sandbox %s is paused with its memory: resume it before its files alone can be saved", r.ID)
	}
	from, err := a.saves.Hold(r.Checkpoint)
	if err != nil {
		return snapshot.Manifest{}, err
	}
	defer from.Release()
	return a.linkCheckpoint(id, from, false)
}

// unfit says why nothing can be done with a sandbox in its present state.
func (in *instance) unfit(r *journal.Record) error {
	switch r.State { //nolint:exhaustive // all others have ended, or are about to
	case sandbox.StatePaused:
		return sandbox.Conflictf("sandbox %s is paused", r.ID)
	case sandbox.StatePausing, sandbox.StateResuming, sandbox.StateMigrating:
		return sandbox.Conflictf("sandbox %s is %s: try again in a moment", r.ID, r.State)
	default:
	}
	return sandbox.NotFoundf("sandbox %s is %s: %s", r.ID, r.State, ending(r))
}

// RemoveCheckpoint deletes a checkpoint as soon as nothing starts from it.
func (a *Agent) RemoveCheckpoint(ctx context.Context, req *agentv1.RemoveCheckpointRequest) (*agentv1.RemoveCheckpointResponse, error) {
	id := req.GetCheckpointId()
	if err := snapshot.CheckID(id); err != nil {
		return nil, toWireError(err)
	}
	if req.GetBucket() {
		if err := a.unstore(ctx, id); err != nil {
			return nil, toWireError(fmt.Errorf("remove checkpoint %s from the bucket: %w", id, err))
		}
	}
	if m, err := a.saves.Get(id); err != nil || m.Pause {
		return &agentv1.RemoveCheckpointResponse{}, nil //nolint:nilerr // what is not there is removed
	}
	if err := a.saves.Remove(id); err != nil {
		return nil, toWireError(fmt.Errorf("remove checkpoint %s: %w", id, err))
	}
	a.outdate(func(k poolKey, _ *pool) bool { return k.checkpoint == id })
	a.log.InfoContext(ctx, "checkpoint removed", slog.String("op", "remove_checkpoint"), slog.String("checkpoint_id", id))
	return &agentv1.RemoveCheckpointResponse{}, nil
}

// admitBuild makes room for a sandbox that a build's steps run in, and returns it with op held until the caller gives it
// back with abandon. Nobody is told of it, nothing but the caller ends it, and Recover clears it away.
func (a *Agent) admitBuild(ctx context.Context, buildID, digest string, size sandbox.Resources) (*instance, error) {
	r := a.newRecord(poolKey{digest: digest, size: size}, &snapshot.Manifest{})
	r.BuildID, r.AllowInternet = buildID, true
	return a.admit(ctx, &r)
}
