package history

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Query returns events in order of ID. With After or Since it returns the first ones from there on, so that a caller can
// go on from the last ID; without both it returns the newest ones.
func (h *History) Query(ctx context.Context, q Query) ([]Event, error) {
	text, args := selectEvents(q)
	rows, err := h.read.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, fmt.Errorf("query events: %w", err)
	}
	defer func() { _ = rows.Close() }() // rows.Err below reports what matters
	out := []Event{}
	for rows.Next() {
		e, err := scanEvent(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("query events: %w", err)
	}
	if !q.forward() {
		slices.Reverse(out)
	}
	return out, nil
}

// selectEvents returns the statement for q and its arguments.
func selectEvents(q Query) (text string, args []any) {
	var where []string
	add := func(cond string, arg any) {
		where = append(where, cond)
		args = append(args, arg)
	}
	if q.Sandbox != "" {
		add("sandbox_id = ? AND sandbox_id <> ''", string(q.Sandbox)) // the second half lets the partial index serve
	}
	if q.Node != "" {
		add("node_id = ?", string(q.Node))
	}
	if q.Type != "" {
		add("type = ?", q.Type)
	}
	if !q.Since.IsZero() {
		add("time >= ?", q.Since.UnixNano())
	}
	if q.After > 0 {
		add("id > ?", q.After)
	}
	var b strings.Builder
	b.WriteString("SELECT id, time, type, node_id, sequence, sandbox_id, message, fields FROM events")
	if len(where) > 0 {
		b.WriteString(" WHERE " + strings.Join(where, " AND "))
	}
	b.WriteString(" ORDER BY id")
	if !q.forward() {
		b.WriteString(" DESC")
	}
	b.WriteString(" LIMIT ?")
	return b.String(), append(args, q.limit())
}

func scanEvent(rows *sql.Rows) (Event, error) {
	var e Event
	var at int64
	var node, id string
	var sequence sql.NullInt64
	var fields sql.NullString
	if err := rows.Scan(&e.ID, &at, &e.Type, &node, &sequence, &id, &e.Message, &fields); err != nil {
		return e, fmt.Errorf("read event: %w", err)
	}
	e.Time, e.NodeID, e.Sequence, e.SandboxID = time.Unix(0, at).UTC(), sandbox.NodeID(node), sequence.Int64, sandbox.ID(id)
	if fields.Valid {
		if err := json.Unmarshal([]byte(fields.String), &e.Fields); err != nil {
			return e, fmt.Errorf("read event %d: %w", e.ID, err)
		}
	}
	return e, nil
}
