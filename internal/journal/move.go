package journal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Receive makes room for a sandbox that comes from another node and writes its record, in one transaction, as Admit does. What
// is left of an earlier stay gives way if it has ended, and its idempotency key does if another sandbox has it here. Errors:
// ErrExhausted, ErrInvalid, and ErrConflict for a sandbox that is here. Soft.
func (j *Journal) Receive(ctx context.Context, r Record) (Record, error) {
	if r.State != sandbox.StateMigrating || !r.Received {
		return r, sandbox.Invalidf("sandbox %s: a received one is %s, not %q", r.ID, sandbox.StateMigrating, r.State)
	}
	err := j.commit(ctx, false, func(ctx context.Context, t *tx) error {
		old, err := t.get(ctx, r.ID)
		switch {
		case err == nil && !old.State.Ended():
			return sandbox.Conflictf("sandbox %s is here: it is %s", r.ID, old.State)
		case err == nil:
			if _, err := t.stmt.remove.ExecContext(ctx, string(r.ID)); err != nil {
				return fmt.Errorf("replace record %s: %w", r.ID, err)
			}
		case !errors.Is(err, sandbox.ErrNotFound):
			return err
		}
		most := t.opt.MaxSandboxes
		if r.Still() {
			most = 0
		}
		if why := t.sums.short(r.Held(), most); why != "" {
			return sandbox.Exhaustedf("no room for sandbox %s: %s", r.ID, why)
		}
		if err := t.freeKey(ctx, &r); err != nil {
			return err
		}
		return t.insert(ctx, &r)
	})
	return r, err
}

// freeKey takes the idempotency key out of a record if another has it.
func (t *tx) freeKey(ctx context.Context, r *Record) error {
	if r.IdempotencyKey == "" {
		return nil
	}
	_, err := t.read(ctx, t.stmt.byKey, r.IdempotencyKey)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	r.IdempotencyKey = ""
	return err
}

// Release deletes the record of a sandbox whose truth is elsewhere, and appends the change that says so. ErrNotFound means that
// there is no such record. Durable.
func (j *Journal) Release(ctx context.Context, id sandbox.ID, c Change) error {
	return j.commit(ctx, true, func(ctx context.Context, t *tx) error {
		old, err := t.get(ctx, id)
		if err != nil {
			return err
		}
		if _, err := t.stmt.remove.ExecContext(ctx, string(id)); err != nil {
			return fmt.Errorf("release sandbox %s: %w", id, err)
		}
		t.sums.count(&old, -1)
		_, err = t.append(ctx, c)
		return err
	})
}
