package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// LogEntry is one line of a sandbox's or a build's log.
type LogEntry struct {
	Time time.Time
	// Level is debug, info, warn or error.
	Level   string
	Logger  string
	Message string
	Fields  map[string]string
}

// MaxLogEntries is the most that one call returns.
const MaxLogEntries = 5000

// Logs returns a sandbox's log from start on, the oldest first, at most limit entries. While the node keeps it, the log
// of an ended sandbox can be read too. Errors: ErrNotFound.
func (c *Control) Logs(ctx context.Context, id sandbox.ID, start time.Time, limit int) ([]LogEntry, error) {
	if limit < 1 || limit > MaxLogEntries {
		return nil, sandbox.Invalidf("limit %d: want 1 to %d", limit, MaxLogEntries)
	}
	box, err := c.locate(ctx, id)
	if err != nil {
		return nil, err
	}
	agent, err := c.agent(box.NodeID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Logs(ctx, &agentv1.LogsRequest{
		Id: string(id), Start: timeToWire(start), Limit: int32(limit),
	})
	if err = fromNode(box.NodeID, err); errors.Is(err, sandbox.ErrNotFound) {
		return nil, unknown(id)
	}
	if err != nil {
		return nil, fmt.Errorf("get the log of sandbox %s: %w", id, err)
	}
	return logFromWire(resp.GetEntries()), nil
}

func logFromWire(entries []*agentv1.LogEntry) []LogEntry {
	out := make([]LogEntry, 0, len(entries))
	for _, e := range entries {
		out = append(out, LogEntry{
			Time: timeFromWire(e.GetTime()), Level: levelOf(e.GetLevel()), Logger: e.GetLogger(), Message: e.GetMessage(),
			Fields: e.GetFields(),
		})
	}
	return out
}

// levelOf keeps to the closed set that clients know.
func levelOf(s string) string {
	switch s {
	case "debug", "info", "warn", "error":
		return s
	}
	return "info"
}
