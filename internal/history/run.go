package history

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"
)

const (
	pruneEvery = 10 * time.Minute
	// pruneChunk is how many events one transaction removes, so that writers never wait for long.
	pruneChunk = 5000
	// lastWrite bounds the writing of what waits when Run is told to end.
	lastWrite = 5 * time.Second
	// droppedType is the event that tells of events that were dropped.
	droppedType = "history.dropped"
)

const insertEvent = `INSERT INTO events (time, type, node_id, sequence, sandbox_id, message, fields)
	VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`

// Run writes what is appended and removes what is too old, until ctx ends; it writes what waits before it returns. A
// failed write is its callers' error, not Run's. It may run once.
func (h *History) Run(ctx context.Context) error {
	defer close(h.stopped)
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	h.pruneAndLog(ctx)
	for {
		select {
		case b := <-h.queue:
			h.store(ctx, h.gather(b))
		case <-tick.C:
			h.pruneAndLog(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWrite)
			defer cancel()
			for len(h.queue) > 0 {
				h.store(last, h.gather(<-h.queue))
			}
			return nil
		}
	}
}

// gather adds what waits already to the first batch, up to the size of one transaction.
func (h *History) gather(first *batch) []*batch {
	all, n := []*batch{first}, len(first.events)
	for n < maxAppend {
		select {
		case b := <-h.queue:
			all, n = append(all, b), n+len(b.events)
		default:
			return all
		}
	}
	return all
}

// store writes the batches in one transaction and tells those who wait.
func (h *History) store(ctx context.Context, all []*batch) {
	ctx = context.WithoutCancel(ctx) // once begun, a write ends
	dropped := h.dropped.Swap(0)
	err := h.insert(ctx, all, dropped)
	if err != nil {
		h.dropped.Add(dropped)
		h.cfg.Logger.LogAttrs(ctx, slog.LevelError, "events could not be stored", slog.Any("err", err))
	}
	for _, b := range all {
		if b.result != nil {
			b.result <- err
		} else if err != nil {
			h.dropped.Add(int64(len(b.events)))
		}
		h.room.Release(int64(len(b.events)))
	}
}

func (h *History) insert(ctx context.Context, all []*batch, dropped int64) error {
	tx, err := h.write.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	stmt, err := tx.PrepareContext(ctx, insertEvent)
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	defer func() { _ = stmt.Close() }() // belongs to the transaction, which reports what matters
	for _, b := range all {
		for i := range b.events {
			if err := insertOne(ctx, stmt, &b.events[i]); err != nil {
				return err
			}
		}
	}
	if dropped > 0 {
		e := Event{Time: time.Now(), Type: droppedType, Message: fmt.Sprintf("%d events were dropped", dropped)}
		if err := insertOne(ctx, stmt, &e); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

func insertOne(ctx context.Context, stmt *sql.Stmt, e *Event) error {
	var fields sql.NullString
	if len(e.Fields) > 0 {
		text, err := json.Marshal(e.Fields)
		if err != nil {
			return fmt.Errorf("encode fields: %w", err)
		}
		fields = sql.NullString{String: string(text), Valid: true}
	}
	sequence := sql.NullInt64{Int64: e.Sequence, Valid: e.Sequence != 0}
	_, err := stmt.ExecContext(ctx, e.Time.UnixNano(), e.Type, string(e.NodeID), sequence, string(e.SandboxID), e.Message, fields)
	if err != nil {
		return fmt.Errorf("insert event %s: %w", e.Type, err)
	}
	return nil
}

func (h *History) pruneAndLog(ctx context.Context) {
	n, err := h.prune(ctx, time.Now())
	switch {
	case err != nil && ctx.Err() == nil:
		h.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "old events could not be removed", slog.Any("err", err))
	case n > 0:
		h.cfg.Logger.LogAttrs(ctx, slog.LevelDebug, "old events removed", slog.Int64("events", n))
	}
}

// prune removes what is older than the history's age and beyond its count, and returns how many that was.
func (h *History) prune(ctx context.Context, now time.Time) (int64, error) {
	removed := int64(0)
	for {
		byAge, err := h.pruneOnce(ctx, `DELETE FROM events WHERE id IN (SELECT id FROM events WHERE time < ? ORDER BY time LIMIT ?)`,
			now.Add(-h.cfg.MaxAge).UnixNano())
		if err != nil {
			return removed, err
		}
		// Numbers grow by one from event to event, so the newest number tells where the kept ones begin.
		byCount, err := h.pruneOnce(ctx, `DELETE FROM events WHERE id IN
			(SELECT id FROM events WHERE id <= (SELECT max(id) FROM events) - ? ORDER BY id LIMIT ?)`, h.cfg.MaxEvents)
		if err != nil {
			return removed, err
		}
		if removed += byAge + byCount; byAge+byCount == 0 {
			return removed, nil
		}
		// Let what waits be written between two chunks.
		select {
		case b := <-h.queue:
			h.store(ctx, h.gather(b))
		default:
		}
	}
}

func (h *History) pruneOnce(ctx context.Context, query string, bound int64) (int64, error) {
	res, err := h.write.ExecContext(ctx, query, bound, pruneChunk)
	if err != nil {
		return 0, fmt.Errorf("remove events: %w", err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("remove events: %w", err)
	}
	return n, nil
}
