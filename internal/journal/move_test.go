package journal

import (
	"errors"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// received is the record of a sandbox that comes from another node.
func (j *Journal) received(runs bool) Record {
	r := j.newRecord()
	r.State, r.Received, r.Runs, r.Generation = sandbox.StateMigrating, true, runs, 9
	r.Checkpoint, r.PausedBytes = "pause-x-1", 1<<20
	return r
}

func TestReceive(t *testing.T) {
	j := open(t, small().Add(sandbox.Resources{DiskBytes: 2 << 20}))
	ctx := t.Context()
	first, err := j.Receive(ctx, j.received(true))
	if err != nil {
		t.Fatal(err)
	}
	if l := j.Ledger(); l.Allocated.Sandboxes != 1 || l.Allocated.Resources != first.Held() || l.Paused != 0 {
		t.Errorf("ledger: %+v", l)
	}
	if _, err := j.Receive(ctx, first); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("received twice: %v", err)
	}
	if _, err := j.Receive(ctx, j.received(true)); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("without room: %v", err)
	}
	still, err := j.Receive(ctx, j.received(false))
	if err != nil {
		t.Fatalf("one that is paused needs disk alone: %v", err)
	}
	if l := j.Ledger(); l.Allocated.Sandboxes != 1 || l.Paused != 1 {
		t.Errorf("ledger: %+v", l)
	}
	if _, err := j.Put(ctx, still.next(sandbox.StateRunning)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("one that moves paused made to run: %v", err)
	}
	if _, err := j.Put(ctx, still.next(sandbox.StatePaused)); err != nil {
		t.Error(err)
	}
	if _, err := j.Receive(ctx, j.newRecord()); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("one that is created received: %v", err)
	}
}

func TestReceiveReplacesWhatHasEnded(t *testing.T) {
	j := open(t, small().Add(small()))
	ctx := t.Context()
	r := j.received(true)
	r.IdempotencyKey = "key"
	r, err := j.Receive(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	ended := r.next(sandbox.StateLost)
	if _, err := j.Put(ctx, ended, Change{Type: "lost", Sandbox: ended.Sandbox}); err != nil {
		t.Fatal(err)
	}
	again := r
	again.Generation = 12
	if again, err = j.Receive(ctx, again); err != nil || again.IdempotencyKey != "key" {
		t.Fatalf("received again: %+v, %v", again, err)
	}
	other := j.received(true)
	other.IdempotencyKey, other.Resources.DiskBytes = "key", 0
	if other, err = j.Receive(ctx, other); err != nil || other.IdempotencyKey != "" {
		t.Errorf("one with a key that another has: %q, %v", other.IdempotencyKey, err)
	}
}

func TestRelease(t *testing.T) {
	j := open(t, small().Add(small()))
	ctx := t.Context()
	r, err := j.Receive(ctx, j.received(true))
	if err != nil {
		t.Fatal(err)
	}
	c := Change{Type: "forgotten", Time: time.Now(), Sandbox: r.Sandbox}
	if err := j.Release(ctx, r.ID, c); err != nil {
		t.Fatal(err)
	}
	if err := j.Release(ctx, r.ID, c); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("released twice: %v", err)
	}
	if l := j.Ledger(); l.Allocated != (Amount{}) || l.Sequence != 1 {
		t.Errorf("ledger: %+v", l)
	}
	changes, complete, err := j.Changes(ctx, 0, 10)
	if err != nil || !complete || len(changes) != 1 || changes[0].Type != "forgotten" || changes[0].Sandbox.ID != r.ID {
		t.Errorf("changes: %+v, %v, %v", changes, complete, err)
	}
}
