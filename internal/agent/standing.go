package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// A running sandbox moves with its guest, and nothing of it is in a file. Where it departs, the guest stands still from the moment
// that the other node begins to get it until it returns or is forgotten. Where it goes, it is loaded as it comes, and stands
// still until it arrives. A guest outlives the node's process, so it is found again after a restart at either end; what ends
// it there ends that end's copy.

// stands reports whether a sandbox moves with its guest, and not in a checkpoint.
func stands(r *journal.Record) bool { return r.State == sandbox.StateMigrating && r.Checkpoint == "" }

// sendGuest lets another node have the guest of a sandbox that has departed with a generation. It stands still from then on.
func (a *Agent) sendGuest(w http.ResponseWriter, r *http.Request, generation int64) error {
	in, err := a.visible(r.PathValue("id"))
	if err != nil {
		return err
	}
	began := time.Now()
	if err := in.lock(r.Context()); err != nil {
		return err
	}
	defer a.release(in)
	if rec := in.record(); !stands(&rec) || rec.Received || rec.Generation != generation {
		return sandbox.Conflictf("sandbox %s is %s with generation %d: only one that has departed with generation %d is given away",
			in.id, rec.State, rec.Generation, generation)
	}
	ctx, done := in.interruptible(r.Context())
	defer done()
	// The other side may begin while there is nothing to send yet.
	if err := errors.Join(writeHead(w, struct{}{}), http.NewResponseController(w).Flush()); err != nil {
		return err
	}
	saved, err := a.engine.Save(ctx, in.id, engine.SaveSpec{Kind: engine.SaveMemory, Stream: w, Hold: true})
	a.metrics.saved("send", err, began)
	if err != nil {
		return fmt.Errorf("send sandbox %s: %w", in.id, err)
	}
	a.log.InfoContext(ctx, "sandbox sent", slog.String("op", "depart"), slog.String("sandbox_id", string(in.id)),
		slog.Int64("bytes", saved.Bytes), slog.Duration("after", time.Since(began)))
	return nil
}

// loadGuest gets the guest of a sandbox that comes from the first of the peers who gives it. It is loaded and stands still.
//
// Preconditions: the caller holds in.op.
func (a *Agent) loadGuest(ctx context.Context, in *instance, departed int64, peers []*agentv1.Peer) (moved int64, err error) {
	if err := a.gate.enter(ctx, false); err != nil {
		return 0, err
	}
	defer a.gate.leave()
	if a.peers == nil || len(peers) == 0 {
		return 0, sandbox.NotFoundf("nobody was named who has the guest of sandbox %s", in.id)
	}
	from := &peer{peers: a.peers, wire: peers[0]} // nobody else has it
	body, err := from.openGuest(ctx, in.id, departed)
	if err != nil {
		return 0, fmt.Errorf("get the guest from %s: %w", from, err)
	}
	defer func() { _ = body.Close() }() // what counts has been read
	counted := &counter{r: body}
	in.renew()
	err = a.launch(ctx, in, engine.Spec{Stream: counted, Hold: true})
	return counted.n, err
}

// proceed has a guest that stands still run.
//
// Preconditions: the caller holds in.op.
func (a *Agent) proceed(ctx context.Context, in *instance) error {
	ctx, done := in.interruptible(ctx)
	defer done()
	if err := a.engine.Thaw(ctx, in.id); err != nil {
		return fmt.Errorf("let sandbox %s go on: %w", in.id, err)
	}
	if r := in.record(); !r.Received {
		return nil // it is where it was, and knows everything
	}
	g, err := a.awaitGuest(ctx, in)
	if err != nil {
		return err
	}
	return a.initGuest(ctx, in, g)
}

// saveStanding saves a guest that stands still, since its sandbox is to be paused. The record that it returns names the checkpoint.
//
// Preconditions: the caller holds in.op.
func (a *Agent) saveStanding(ctx context.Context, in *instance, r journal.Record) (journal.Record, error) {
	r.Checkpoint = ownCheckpoint(&r)
	in.set(&r)
	m, err := a.saveHeld(ctx, in, engine.SaveSpec{Kind: engine.SaveMemory})
	if err != nil {
		r.Checkpoint = ""
		in.set(&r)
		return r, err
	}
	r.Checkpoint, r.PausedKind, r.PausedBytes = m.ID, m.Kind, m.Bytes
	return r, nil
}

// recoverStanding takes back a sandbox that moved with its guest when the process before ended.
//
// Preconditions: the caller holds in.op.
func (a *Agent) recoverStanding(ctx context.Context, in *instance, running bool) error {
	if !running {
		return a.bereave(ctx, in)
	}
	if err := a.adoptNetwork(ctx, in); err != nil {
		a.log.WarnContext(ctx, "network of a sandbox that moves is gone", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
		return a.bereave(ctx, in)
	}
	if !a.watch(in) {
		return sandbox.Unavailablef("node %s is shutting down", a.node)
	}
	return nil
}

// bereave follows from the end of the guest of a sandbox that moves. A received one is where it came from still. Whether one that
// has departed is lost, or runs elsewhere, shows when it is to return or to be forgotten.
//
// Preconditions: the caller holds in.op.
func (a *Agent) bereave(ctx context.Context, in *instance) error {
	if in.record().Received {
		return a.dropCopy(ctx, in)
	}
	return a.takeBack(ctx, in)
}
