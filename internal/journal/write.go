package journal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxBatch bounds one transaction, and so how long its first request waits for the others.
const maxBatch = 256

// request is one write in the queue.
type request struct {
	do      func(context.Context, *tx) error
	durable bool
	err     error
	done    chan struct{} // closed when err is final
}

// tx is what a request's function works with: the connection and the sums, both of which are put back when it fails.
type tx struct {
	conn *sql.Conn
	stmt *statements
	sums *Ledger
	opt  *Options
}

// commit runs do in a transaction, together with whatever else waits. Once it waits its turn it no longer heeds ctx: a
// write that may or may not have happened helps nobody.
func (j *Journal) commit(ctx context.Context, durable bool, do func(context.Context, *tx) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	r := &request{do: do, durable: durable, done: make(chan struct{})}
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		return errClosed()
	}
	j.queue = append(j.queue, r)
	j.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	for {
		select {
		case <-r.done:
			return r.err
		case j.lead <- struct{}{}:
			j.runBatch(ctx)
			<-j.lead
		}
	}
}

// runBatch takes what is in the queue through one transaction.
//
// Preconditions: the caller holds lead.
func (j *Journal) runBatch(ctx context.Context) {
	j.mu.Lock()
	n := min(len(j.queue), maxBatch)
	batch := j.queue[:n:n]
	j.queue = j.queue[n:]
	if len(j.queue) == 0 {
		j.queue = nil
	}
	closed := j.closed
	j.mu.Unlock()
	if n == 0 {
		return
	}
	defer func() {
		for _, r := range batch {
			close(r.done)
		}
	}()
	var err error
	if closed {
		err = errClosed()
	} else {
		err = j.transact(ctx, batch)
	}
	for _, r := range batch {
		r.err = j.explain(errors.Join(r.err, err))
	}
}

// explain gives what the disk refused its kind: nothing of the request was written, and it may be tried again.
func (j *Journal) explain(err error) error {
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return err
	}
	switch se.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return sandbox.Unavailablef("the disk of %s is full: once there is room again, the node goes on by itself (%v)", j.path, err)
	case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY:
		return sandbox.Unavailablef("%s cannot be written: %v", j.path, err)
	}
	return err
}

// transact runs a batch and commits it. A request that fails takes nothing but its own writes back.
func (j *Journal) transact(ctx context.Context, batch []*request) (err error) {
	durable := false
	for _, r := range batch {
		durable = durable || r.durable
	}
	if err := j.setMode(ctx, !durable); err != nil {
		return err
	}
	if _, err := j.stmt.begin.ExecContext(ctx); err != nil {
		return fmt.Errorf("begin journal transaction: %w", err)
	}
	sums := *j.sums.Load()
	written := false
	for _, r := range batch {
		if r.err = j.runOne(ctx, r, &sums, len(batch) > 1); r.err == nil {
			written = true
		}
	}
	if !written {
		_, _ = j.stmt.rollback.ExecContext(ctx)
		return nil
	}
	if _, err := j.stmt.end.ExecContext(ctx); err != nil {
		_, _ = j.stmt.rollback.ExecContext(ctx)
		return fmt.Errorf("commit journal %s: %w", j.path, err)
	}
	j.sums.Store(&sums)
	return nil
}

func (j *Journal) runOne(ctx context.Context, r *request, sums *Ledger, shared bool) error {
	before := *sums
	if shared {
		if _, err := j.stmt.save.ExecContext(ctx); err != nil {
			return fmt.Errorf("begin journal savepoint: %w", err)
		}
	}
	err := r.do(ctx, &tx{conn: j.conn, stmt: &j.stmt, sums: sums, opt: &j.opt})
	if err != nil {
		*sums = before
	}
	if !shared {
		return err
	}
	if err != nil {
		_, _ = j.stmt.undo.ExecContext(ctx)
	}
	if _, rerr := j.stmt.release.ExecContext(ctx); rerr != nil {
		return errors.Join(err, fmt.Errorf("release journal savepoint: %w", rerr))
	}
	return err
}

// setMode chooses whether the next commit waits for the disk.
func (j *Journal) setMode(ctx context.Context, soft bool) error {
	if j.soft == soft {
		return nil
	}
	mode := "PRAGMA synchronous = FULL"
	if soft {
		mode = "PRAGMA synchronous = NORMAL"
	}
	if _, err := j.conn.ExecContext(ctx, mode); err != nil {
		return fmt.Errorf("set journal mode: %w", err)
	}
	j.soft = soft
	return nil
}

// Readmit makes room for a paused sandbox and notes that it is resuming, in one transaction, as Admit does. Errors:
// ErrExhausted, ErrNotFound, and ErrConflict for one that is not paused. Soft.
func (j *Journal) Readmit(ctx context.Context, r Record) (Record, error) {
	r.State = sandbox.StateResuming
	err := j.commit(ctx, false, func(ctx context.Context, t *tx) error {
		old, err := t.get(ctx, r.ID)
		if err != nil {
			return err
		}
		if old.State != sandbox.StatePaused {
			return sandbox.Conflictf("sandbox %s is %s, not %s", r.ID, old.State, sandbox.StatePaused)
		}
		if why := t.sums.short(r.Resources, t.opt.MaxSandboxes); why != "" {
			return sandbox.Exhaustedf("no room to resume sandbox %s: %s", r.ID, why)
		}
		old.State = sandbox.StateResuming // the one change that follows leaves to us
		if err := follows(&old, &r); err != nil {
			return err
		}
		old.State, r.Last = sandbox.StatePaused, old.Last
		t.sums.count(&old, -1)
		t.sums.count(&r, 1)
		return t.put(ctx, &r)
	})
	return r, err
}

// Rewind notes that a sandbox that is being paused goes on from another checkpoint: in one step it is paused in that and
// resuming from it, and what it holds stays its own. Durable.
func (j *Journal) Rewind(ctx context.Context, r Record) (Record, error) {
	r.State, r.Rewinding = sandbox.StateResuming, true
	err := j.commit(ctx, true, func(ctx context.Context, t *tx) error {
		old, err := t.get(ctx, r.ID)
		if err != nil {
			return err
		}
		if old.State != sandbox.StatePausing {
			return sandbox.Conflictf("sandbox %s is %s, not %s", r.ID, old.State, sandbox.StatePausing)
		}
		r.Last = old.Last
		t.sums.count(&old, -1)
		t.sums.count(&r, 1)
		return t.put(ctx, &r)
	})
	return r, err
}

// Put replaces the record of a sandbox and appends changes, in one transaction. It is durable when there are changes,
// else soft. It returns the record with its newest mark. ErrNotFound means that there is no such record, ErrConflict
// that its state does not allow this one or that a newer generation is there.
func (j *Journal) Put(ctx context.Context, r Record, changes ...Change) (Record, error) {
	return j.put(ctx, r, len(changes) > 0, changes)
}

// PutDurable is Put without changes, and durable.
func (j *Journal) PutDurable(ctx context.Context, r Record) (Record, error) {
	return j.put(ctx, r, true, nil)
}

func (j *Journal) put(ctx context.Context, r Record, durable bool, changes []Change) (Record, error) {
	err := j.commit(ctx, durable, func(ctx context.Context, t *tx) error {
		old, err := t.get(ctx, r.ID)
		if err != nil {
			return err
		}
		if err := follows(&old, &r); err != nil {
			return err
		}
		r.Last, r.Rests = old.Last, r.State == sandbox.StateStopping && old.Still()
		for _, c := range changes {
			if r.Last, err = t.append(ctx, c); err != nil {
				return err
			}
		}
		t.sums.count(&old, -1)
		t.sums.count(&r, 1)
		return t.put(ctx, &r)
	})
	return r, err
}

// follows checks that next may replace old.
func follows(old, next *Record) error {
	switch {
	case old.State == sandbox.StatePaused && next.State == sandbox.StateResuming:
		return sandbox.Invalidf("sandbox %s: a paused sandbox needs room before it can resume", old.ID)
	case old.State == sandbox.StateMigrating && !old.Runs && next.State == sandbox.StateRunning:
		return sandbox.Invalidf("sandbox %s: one that moves as a paused one arrives as that", old.ID)
	case old.State != next.State && !old.State.CanBecome(next.State):
		return sandbox.Conflictf("sandbox %s is %s and cannot become %s", old.ID, old.State, next.State)
	case next.Generation < old.Generation:
		return sandbox.Conflictf("sandbox %s has generation %d, newer than %d", old.ID, old.Generation, next.Generation)
	case next.Resources != old.Resources:
		return sandbox.Invalidf("sandbox %s: what it holds cannot change", old.ID)
	case next.Warm && !old.Warm:
		return sandbox.Invalidf("sandbox %s: a claimed sandbox cannot become warm", old.ID)
	}
	return nil
}

// Forget deletes records, and with them what they hold. Unknown ids are no error. Soft.
func (j *Journal) Forget(ctx context.Context, ids ...sandbox.ID) error {
	return j.commit(ctx, false, func(ctx context.Context, t *tx) error {
		for _, id := range ids {
			old, err := t.get(ctx, id)
			if errors.Is(err, sandbox.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			if _, err := t.stmt.remove.ExecContext(ctx, string(id)); err != nil {
				return fmt.Errorf("forget sandbox %s: %w", id, err)
			}
			t.sums.count(&old, -1)
		}
		return nil
	})
}

// Acknowledge notes that the server has every change up to n, and drops those. A number beyond the last one given out
// means that this journal is older than what the server has seen of it: numbering then goes on from there. Soft, except
// in that case.
func (j *Journal) Acknowledge(ctx context.Context, n int64) error {
	return j.commit(ctx, n > j.Ledger().Sequence, func(ctx context.Context, t *tx) error {
		if n <= t.sums.Acknowledged {
			return nil
		}
		if _, err := t.stmt.trim.ExecContext(ctx, n); err != nil {
			return fmt.Errorf("trim changes up to %d: %w", n, err)
		}
		if _, err := t.stmt.setMeta.ExecContext(ctx, "acknowledged", strconv.FormatInt(n, 10)); err != nil {
			return fmt.Errorf("acknowledge %d: %w", n, err)
		}
		t.sums.Acknowledged = n
		t.sums.Sequence = max(t.sums.Sequence, n)
		t.sums.Oldest = max(t.sums.Oldest, n+1)
		return nil
	})
}

// PutImage notes that the node has an image, which its template needs. Durable.
func (j *Journal) PutImage(ctx context.Context, im Image) error {
	return j.commit(ctx, true, func(ctx context.Context, t *tx) error {
		old, err := t.image(ctx, im.Digest)
		if err != nil {
			return err
		}
		im.Templates, im.Removed = old.Templates, false
		if im.TemplateID != "" && !slices.Contains(im.Templates, im.TemplateID) {
			im.Templates = append(im.Templates, im.TemplateID)
		}
		return t.replaceImage(ctx, &im)
	})
}

// ReleaseImage notes that a template no longer needs an image. Removed says that no template does: the image may go when
// nothing else needs it. Durable.
func (j *Journal) ReleaseImage(ctx context.Context, template sandbox.TemplateID, digest string) (removed bool, err error) {
	err = j.commit(ctx, true, func(ctx context.Context, t *tx) error {
		im, err := t.image(ctx, digest)
		if err != nil {
			return err
		}
		im.Templates = slices.DeleteFunc(im.Templates, func(o sandbox.TemplateID) bool { return o == template })
		im.Removed = len(im.Templates) == 0
		removed = im.Removed
		return t.replaceImage(ctx, &im)
	})
	return removed, err
}

// RemoveImage notes that an image is gone. An unknown digest is no error. Durable.
func (j *Journal) RemoveImage(ctx context.Context, digest string) error {
	return j.commit(ctx, true, func(ctx context.Context, t *tx) error {
		if _, err := t.stmt.removeImage.ExecContext(ctx, digest); err != nil {
			return fmt.Errorf("remove image %s: %w", digest, err)
		}
		return nil
	})
}
