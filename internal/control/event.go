package control

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Event is something that happened.
type Event struct {
	// ID grows with each event; the history sets it.
	ID        int64
	Time      time.Time
	Type      string
	NodeID    sandbox.NodeID
	SandboxID sandbox.ID
	// Sequence is the node's number for it; 0 where the event is the server's own. The history keeps an event with the
	// node and number of one that it has as that one.
	Sequence int64
	Message  string
	Fields   map[string]string
}

// EventQuery says which events to return, always in order of id. The zero value is the newest of all; from After or
// Since on, it is the first ones from there, so that a caller can go on from the last id.
type EventQuery struct {
	SandboxID sandbox.ID
	Type      string
	Since     time.Time
	// After leaves out the events up to this id.
	After int64
	// Limit is 1 to MaxEvents; 0 means 100.
	Limit int
}

// MaxEvents is the most events that one call returns.
const MaxEvents = 1000

// Events returns what happened, in order of id.
func (c *Control) Events(ctx context.Context, q EventQuery) ([]Event, error) {
	setDefault(&q.Limit, 100)
	if q.Limit < 1 || q.Limit > MaxEvents {
		return nil, sandbox.Invalidf("limit %d: want 1 to %d", q.Limit, MaxEvents)
	}
	if q.After < 0 {
		return nil, sandbox.Invalidf("after %d: want the id of an event", q.After)
	}
	out, err := c.history.Query(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("query events: %w", err)
	}
	return out, nil
}

// note keeps an event of the server's own. The operation that it tells of is done, so it does not fail with it.
func (c *Control) note(ctx context.Context, e Event) {
	e.Time = time.Now().UTC()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	if err := c.history.Append(ctx, []Event{e}); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "event not kept", slog.String("type", e.Type), errAttr(err))
	}
}

func errAttr(err error) slog.Attr            { return slog.String("err", err.Error()) }
func nodeAttr(node sandbox.NodeID) slog.Attr { return slog.String("node_id", string(node)) }
