package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Receive admits a sandbox of another node and gets what it was saved in. After an error nothing of it is here.
func (a *Agent) Receive(ctx context.Context, req *agentv1.ReceiveRequest) (*agentv1.ReceiveResponse, error) {
	r, err := a.receivedRecord(ctx, req)
	if err != nil {
		return nil, toWireError(err)
	}
	began := time.Now()
	in, err := a.admitReceived(ctx, r)
	if err != nil {
		return nil, toWireError(err)
	}
	moved, err := a.receive(ctx, in, sources{peers: req.GetPeers(), bucket: req.GetBucket()}, req.GetParcel().GetSandbox().GetGeneration())
	a.release(in)
	if err != nil {
		a.log.WarnContext(ctx, "sandbox not received", slog.String("op", "receive"), slog.String("sandbox_id", string(in.id)),
			slog.Duration("after", time.Since(began)), slog.Any("err", err))
		return nil, toWireError(err)
	}
	rec := in.record()
	a.log.InfoContext(ctx, "sandbox received", slog.String("op", "receive"), slog.String("sandbox_id", string(in.id)),
		slog.Int64("bytes", moved), slog.Duration("after", time.Since(began)))
	return &agentv1.ReceiveResponse{Sandbox: toWireSandbox(&rec.Sandbox), Load: a.load(), MovedBytes: moved}, nil
}

// receivedRecord returns the record of the sandbox that a request brings. Where the request has nothing but the name of a
// checkpoint, that is fetched first: the sandbox's settings come with it.
func (a *Agent) receivedRecord(ctx context.Context, req *agentv1.ReceiveRequest) (*journal.Record, error) {
	if req.GetParcel() != nil {
		return a.fromWireParcel(req.GetParcel(), req.GetGeneration())
	}
	id := req.GetCheckpointId()
	p, err := a.keptParcel(id)
	if isNotFound(err) {
		if _, _, err := a.fetchCheckpoint(ctx, id, sources{peers: req.GetPeers(), bucket: req.GetBucket()}, true); err != nil {
			return nil, err
		}
		p, err = a.keptParcel(id)
	}
	if err != nil {
		return nil, err
	}
	if got := p.GetCheckpoint().GetId(); got != id {
		return nil, sandbox.Invalidf("checkpoint %s came with the settings of a sandbox that was saved in %.80q", id, got)
	}
	return a.fromWireParcel(p, req.GetGeneration())
}

// admitReceived makes room for a sandbox that comes, and returns its instance with op held. One that was received before, by
// the same generation, is returned as it is.
func (a *Agent) admitReceived(ctx context.Context, r *journal.Record) (*instance, error) {
	if in, ok := a.get(r.ID); ok {
		if err := in.lock(ctx); err != nil {
			return nil, err
		}
		switch have := in.record(); {
		case have.State == sandbox.StateMigrating && have.Received && have.Generation == r.Generation && a.has(in):
			return in, nil
		case !have.State.Ended() && a.has(in):
			a.release(in)
			return nil, sandbox.Conflictf("sandbox %s is on node %s already: it is %s, of generation %d", r.ID, a.node, have.State, have.Generation)
		}
		a.release(in)
	}
	var in *instance
	err := a.withRoom(ctx, r.Held(), func() error {
		got, err := a.journal.Receive(ctx, *r)
		if err != nil {
			return err
		}
		in = newInstance(&got)
		in.op <- struct{}{}
		a.mu.Lock()
		a.all[in.id] = in
		a.mu.Unlock()
		return nil
	})
	return in, err
}

// has reports whether an instance is the node's still.
func (a *Agent) has(in *instance) bool {
	known, ok := a.get(in.id)
	return ok && known == in
}

// receive gets what a sandbox needs to go on: its image, and its guest or what it was saved in. Departed is the generation that it
// has where it comes from.
//
// Preconditions: the caller holds in.op.
func (a *Agent) receive(ctx context.Context, in *instance, from sources, departed int64) (moved int64, err error) {
	r := in.record()
	if r.Last.Sequence > 0 {
		return 0, nil // received before
	}
	ctx, done := in.interruptible(ctx)
	defer done()
	moved, err = a.fetchFor(ctx, &r, from)
	if err == nil && stands(&r) {
		moved, err = a.loadGuest(ctx, in, departed, from.peers)
	}
	if err == nil {
		r, at := in.record(), now()
		r.Append(journal.Line{Time: at, Level: "info", Message: "sandbox received from another node"})
		err = a.put(ctx, in, r, journal.Change{Type: "received", Time: at, Sandbox: r.Sandbox})
	}
	if err == nil {
		a.joinKey(in)
		return moved, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	a.retryLater(ctx, in, a.unreceive(ctx, in))
	return moved, fmt.Errorf("receive sandbox %s: %w", in.id, err)
}

// fetchFor gets the image and the checkpoint, if it has one, of a sandbox, where they are not here.
func (a *Agent) fetchFor(ctx context.Context, r *journal.Record, from sources) (moved int64, err error) {
	if _, err := a.images.Path(r.ImageDigest); err != nil {
		if moved, err = a.fetchImage(ctx, r.ImageDigest, from); err != nil {
			return moved, err
		}
	}
	if stands(r) {
		return moved, nil
	}
	m, err := a.saves.Get(r.Checkpoint)
	if isNotFound(err) {
		var n int64
		m, n, err = a.fetchCheckpoint(ctx, r.Checkpoint, from, false)
		moved += n
	}
	switch {
	case err != nil:
		return moved, err
	case m.SandboxID != r.ID || m.ImageDigest != r.ImageDigest:
		return moved, sandbox.Invalidf("checkpoint %s is of sandbox %s with image %s, not of %s with %s", m.ID, m.SandboxID, m.ImageDigest, r.ID, r.ImageDigest)
	}
	return moved, nil
}

// joinKey makes the idempotency key that a sandbox brought lead to it.
func (a *Agent) joinKey(in *instance) {
	key := in.record().IdempotencyKey
	if key == "" {
		return
	}
	done := make(chan struct{})
	close(done)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byKey[key] == nil {
		a.byKey[key] = &flight{done: done, in: in}
	}
}

// unreceive clears away a sandbox that did not come.
//
// Preconditions: the caller holds in.op.
func (a *Agent) unreceive(ctx context.Context, in *instance) error {
	r := in.record()
	if err := a.clear(context.WithoutCancel(ctx), in); err != nil {
		in.setLeft(true)
		return err
	}
	a.dropFetched(ctx, &r)
	return nil
}

// dropFetched deletes what a copy of a sandbox would have gone on from, unless that was here before as a replica. It is gone
// before anybody is told that the copy is: from then on it may be wanted here as a replica.
func (a *Agent) dropFetched(ctx context.Context, r *journal.Record) {
	if r.Checkpoint == "" {
		a.poke() // its image may have lost its last user
		return
	}
	if m, err := a.saves.Get(r.Checkpoint); err != nil || m.Replica && r.Received {
		return
	}
	if err := a.saves.Remove(r.Checkpoint); err != nil { // the next process does it
		a.log.WarnContext(ctx, "checkpoint not deleted", slog.String("checkpoint_id", r.Checkpoint), slog.Any("err", err))
	}
	a.poke() // an image may have lost its last user
}

// Forget drops a copy of a sandbox that is not the one that counts, or what is kept of a sandbox of another node.
func (a *Agent) Forget(ctx context.Context, req *agentv1.ForgetRequest) (*agentv1.ForgetResponse, error) {
	if id := req.GetReplica(); id != "" {
		if err := a.forgetReplica(ctx, id); err != nil {
			return nil, toWireError(fmt.Errorf("forget replica %.80s: %w", id, err))
		}
	}
	if in, ok := a.get(sandbox.ID(req.GetId())); ok {
		if err := a.forgetCopy(ctx, in, req.GetBelow()); err != nil {
			return nil, toWireError(err)
		}
	}
	return &agentv1.ForgetResponse{Load: a.load()}, nil
}

func (a *Agent) forgetCopy(ctx context.Context, in *instance, below int64) error {
	if r := in.record(); r.State == sandbox.StateMigrating && (below == 0 || r.Generation < below) {
		in.interrupt(sandbox.Unavailablef("sandbox %s is not to come to node %s any more", in.id, a.node))
	}
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	switch r := in.record(); {
	case r.State.Ended() || !a.has(in):
		return nil
	case below > 0 && r.Generation >= below:
		return sandbox.Conflictf("sandbox %s has generation %d on node %s, which is not below %d: it is kept", in.id, r.Generation, a.node, below)
	case below == 0 && r.State != sandbox.StateMigrating:
		return sandbox.Conflictf("sandbox %s is %s on node %s: only a copy that moves is dropped whatever its generation", in.id, r.State, a.node)
	}
	if err := a.dropCopy(ctx, in); err != nil {
		return fmt.Errorf("forget sandbox %s: %w: try again: %w", in.id, sandbox.ErrUnavailable, err)
	}
	return nil
}

// dropCopy takes away all that the node has of a sandbox. The record goes first of what a crash would leave: what it named is
// found without it.
//
// Preconditions: the caller holds in.op.
func (a *Agent) dropCopy(ctx context.Context, in *instance) error {
	ctx = context.WithoutCancel(ctx)
	in.renew()
	if err := a.free(ctx, in); err != nil {
		return err
	}
	r := in.record()
	r.NodeID = a.node
	err := a.journal.Release(ctx, in.id, journal.Change{Type: "forgotten", Time: now(), Sandbox: r.Sandbox})
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	a.dropFetched(ctx, &r)
	a.announce()
	a.drop(in)
	a.log.InfoContext(ctx, "copy of a sandbox dropped", slog.String("op", "forget"), slog.String("sandbox_id", string(in.id)),
		slog.Int64("generation", r.Generation))
	return nil
}
