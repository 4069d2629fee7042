package guest

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// ringSize is how many entries the agent's log keeps.
const ringSize = 1000

// maxLogValue bounds one value in an entry, in bytes.
const maxLogValue = 512

// LogEntry is one entry of GET /logs.
type LogEntry struct {
	Time    time.Time         `json:"time"`
	Level   string            `json:"level"`
	Logger  string            `json:"logger"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

// ring is a slog.Handler that keeps the last entries and passes them on to next, if there is one.
type ring struct {
	next  slog.Handler
	attrs []slog.Attr
	to    *ring // the ring that holds the entries; nil means itself

	mu      sync.Mutex
	entries []LogEntry
	oldest  int
}

func (r *ring) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

func (r *ring) Handle(ctx context.Context, rec slog.Record) error {
	e := LogEntry{Time: rec.Time.UTC(), Level: strings.ToLower(rec.Level.String()), Logger: "envd", Message: rec.Message}
	add := func(a slog.Attr) bool {
		if e.Fields == nil {
			e.Fields = make(map[string]string, rec.NumAttrs()+len(r.attrs))
		}
		e.Fields[a.Key] = clip(a.Value.Resolve().String())
		return true
	}
	for _, a := range r.attrs {
		add(a)
	}
	rec.Attrs(add)
	r.store().append(e)
	if r.next != nil && r.next.Enabled(ctx, rec.Level) {
		return r.next.Handle(ctx, rec)
	}
	return nil
}

func (r *ring) WithAttrs(attrs []slog.Attr) slog.Handler {
	child := &ring{attrs: append(slices.Clip(r.attrs), attrs...), to: r.store()}
	if r.next != nil {
		child.next = r.next.WithAttrs(attrs)
	}
	return child
}

// WithGroup ignores groups: entries are flat.
func (r *ring) WithGroup(string) slog.Handler { return r }

func (r *ring) store() *ring {
	if r.to != nil {
		return r.to
	}
	return r
}

func (r *ring) append(e LogEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.entries) < ringSize {
		r.entries = append(r.entries, e)
		return
	}
	r.entries[r.oldest] = e
	r.oldest = (r.oldest + 1) % ringSize
}

// clear forgets all entries.
func (r *ring) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entries, r.oldest = nil, 0
}

// since returns the entries after t, oldest first.
func (r *ring) since(t time.Time) []LogEntry {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []LogEntry{}
	for i := range r.entries {
		if e := r.entries[(r.oldest+i)%len(r.entries)]; e.Time.After(t) {
			out = append(out, e)
		}
	}
	return out
}

func clip(s string) string {
	if len(s) <= maxLogValue {
		return s
	}
	return strings.ToValidUTF8(s[:maxLogValue], "") + "…"
}

// getLogs answers GET /logs?since=<RFC 3339> with the entries after that moment.
func (s *Server) getLogs(w http.ResponseWriter, r *http.Request) {
	var since time.Time
	if text := r.URL.Query().Get("since"); text != "" {
		var err error
		if since, err = time.Parse(time.RFC3339Nano, text); err != nil {
			writeError(w, httpErrorf(http.StatusBadRequest, "since %q is not a time such as 2026-01-02T15:04:05.123Z", text))
			return
		}
	}
	writeJSON(w, http.StatusOK, s.ring.since(since))
}
