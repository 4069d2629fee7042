package e2b

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxLogs is how many entries an answer holds at most, and by default.
const maxLogs = 1000

// logs is the older form: each entry as text and as an object.
func (s *server) logs(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	start, err := exchange.UnixTime(values, "start", time.Millisecond)
	if err != nil {
		return err
	}
	limit, err := exchange.Int(values, "limit", 1, maxLogs, maxLogs)
	if err != nil {
		return err
	}
	entries, err := s.control.Logs(r.Context(), id, start, int(limit))
	if err != nil {
		return err
	}
	out := struct {
		Logs    []lineWire `json:"logs"`
		Entries []logWire  `json:"logEntries"`
	}{Logs: make([]lineWire, 0, len(entries)), Entries: make([]logWire, 0, len(entries))}
	for _, e := range entries {
		line, err := lineToWire(e)
		if err != nil {
			return err
		}
		out.Logs = append(out.Logs, line)
		out.Entries = append(out.Entries, logToWire(e))
	}
	return exchange.JSON(w, http.StatusOK, out)
}

// levels is the order of the log levels.
//
//nolint:gochecknoglobals // a table, never written
var levels = []string{"debug", "info", "warn", "error"}

// logQuery is what the present form asks for.
type logQuery struct {
	cursor   time.Time
	backward bool
	limit    int
	level    string
	search   string
}

func readLogQuery(r *http.Request) (logQuery, error) {
	values, err := exchange.Query(r)
	if err != nil {
		return logQuery{}, err
	}
	q := logQuery{level: values.Get("level"), search: values.Get("search")}
	if q.cursor, err = exchange.UnixTime(values, "cursor", time.Millisecond); err != nil {
		return logQuery{}, err
	}
	limit, err := exchange.Int(values, "limit", 1, maxLogs, maxLogs)
	if err != nil {
		return logQuery{}, err
	}
	q.limit = int(limit)
	if q.level != "" && !slices.Contains(levels, q.level) {
		return logQuery{}, sandbox.Invalidf("level %.20q: want one of %s", q.level, strings.Join(levels, ", "))
	}
	switch direction := values.Get("direction"); direction {
	case "", "forward":
	case "backward":
		q.backward = true
	default:
		return logQuery{}, sandbox.Invalidf("direction %.20q: want forward or backward", direction)
	}
	return q, nil
}

func (q *logQuery) matches(e control.LogEntry) bool {
	return slices.Index(levels, e.Level) >= slices.Index(levels, q.level) && strings.Contains(e.Message, q.search) &&
		(!q.backward || q.cursor.IsZero() || !e.Time.After(q.cursor))
}

// logsNew reads forward from the cursor, or backward from it.
func (s *server) logsNew(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	q, err := readLogQuery(r)
	if err != nil {
		return err
	}
	start := q.cursor
	if q.backward {
		start = time.Time{}
	}
	entries, err := s.control.Logs(r.Context(), id, start, control.MaxLogEntries)
	if err != nil {
		return err
	}
	if q.backward {
		slices.Reverse(entries)
	}
	out := struct {
		Logs []logWire `json:"logs"`
	}{Logs: []logWire{}}
	for _, e := range entries {
		if len(out.Logs) == q.limit {
			break
		}
		if q.matches(e) {
			out.Logs = append(out.Logs, logToWire(e))
		}
	}
	return exchange.JSON(w, http.StatusOK, out)
}
