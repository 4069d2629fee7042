package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Limits of what a log request returns. What a guest says counts as hostile.
const (
	logsTimeout   = 2 * time.Second
	defaultLogs   = 1000
	maxLogs       = 5000
	maxLogText    = 8 << 10
	maxLogFields  = 32
	loggerOfNode  = "node"
	loggerOfGuest = "guest"
)

// logEntry is one line of a log.
type logEntry struct {
	Time    time.Time         `json:"time"`
	Level   string            `json:"level"`
	Logger  string            `json:"logger"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields"`
}

// parseGuestLogs reads what the agent inside sent.
func parseGuestLogs(data []byte) ([]logEntry, error) {
	var entries []logEntry
	if err := json.Unmarshal(data, &entries); err != nil {
		return nil, fmt.Errorf("log of the agent inside: %w", err)
	}
	if len(entries) > maxLogs {
		entries = entries[len(entries)-maxLogs:]
	}
	for i := range entries {
		entries[i].clean()
	}
	return entries, nil
}

// clean bounds an entry, and keeps to what people and programs expect of one.
func (e *logEntry) clean() {
	switch e.Level {
	case "debug", "info", "warn", "error":
	default:
		e.Level = "info"
	}
	if e.Time = e.Time.UTC(); e.Time.Year() < 1970 || e.Time.Year() > 9999 {
		e.Time = time.Unix(0, 0).UTC()
	}
	if e.Logger = clip(e.Logger, 64); e.Logger == "" {
		e.Logger = loggerOfGuest
	}
	e.Message = clip(e.Message, maxLogText)
	fields := make(map[string]string, min(len(e.Fields), maxLogFields))
	for k, v := range e.Fields {
		if len(fields) == maxLogFields {
			break
		}
		fields[clip(k, 64)] = clip(v, maxLogText)
	}
	e.Fields = fields
}

func clip(s string, most int) string {
	if len(s) > most {
		s = s[:most]
	}
	return strings.ToValidUTF8(s, "")
}

// Logs returns what happened to a sandbox and what the agent inside says, oldest first.
func (a *Agent) Logs(ctx context.Context, req *agentv1.LogsRequest) (*agentv1.LogsResponse, error) {
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	limit := int(req.GetLimit())
	if limit < 0 || limit > maxLogs {
		return nil, toWireError(sandbox.Invalidf("limit of %d log entries: want 1 to %d, or 0 for %d", limit, maxLogs, defaultLogs))
	}
	orDefault(&limit, defaultLogs)
	start := fromWireTime(req.GetStart())
	r := in.record()
	var entries []logEntry
	for _, l := range r.Lines {
		entries = append(entries, logEntry{Time: l.Time, Level: l.Level, Logger: loggerOfNode, Message: l.Message})
	}
	if r.State == sandbox.StateRunning {
		gctx, cancel := context.WithTimeout(ctx, logsTimeout)
		defer cancel()
		more, err := a.guestLogs(gctx, in, start)
		if err != nil {
			a.log.DebugContext(ctx, "log of the agent inside not read", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
		}
		entries = append(entries, more...)
	}
	entries = slices.DeleteFunc(entries, func(e logEntry) bool { return e.Time.Before(start) })
	slices.SortStableFunc(entries, func(x, y logEntry) int { return x.Time.Compare(y.Time) })
	entries = entries[:min(limit, len(entries))]
	return &agentv1.LogsResponse{Entries: toWireLogs(entries)}, nil
}

func toWireLogs(entries []logEntry) []*agentv1.LogEntry {
	out := make([]*agentv1.LogEntry, 0, len(entries))
	for i := range entries {
		e := &entries[i]
		out = append(out, &agentv1.LogEntry{
			Time: toWireTime(e.Time), Level: e.Level, Logger: e.Logger, Message: e.Message, Fields: e.Fields,
		})
	}
	return out
}
