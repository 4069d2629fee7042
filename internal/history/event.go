package history

import (
	"strings"
	"time"
	"unicode/utf8"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The bounds of an event. Text may come from a guest: what is too long is cut, never refused.
const (
	maxType    = 64
	maxMessage = 4 << 10
	maxFields  = 32
	maxField   = 1 << 10
)

// Event is something that happened.
type Event struct {
	// ID is given by the history and grows; it is the place to go on reading from.
	ID   int64
	Time time.Time
	// Type is from the closed set of the one who appends, such as "sandbox.created".
	Type   string
	NodeID sandbox.NodeID
	// Sequence is the node's number of the change that the event tells of; an event with a node and a number that are
	// kept already is not kept twice. 0 means that there is none.
	Sequence  int64
	SandboxID sandbox.ID
	Message   string
	Fields    map[string]string
}

// Query asks for events. Zero fields ask for nothing.
type Query struct {
	Sandbox sandbox.ID
	Node    sandbox.NodeID
	Type    string
	// Since is the earliest time of interest.
	Since time.Time
	// After is the last ID that the caller has seen.
	After int64
	// Limit is how many events to return; 0 means 100, and more than 10,000 are never returned.
	Limit int
}

const (
	defaultLimit = 100
	maxLimit     = 10_000
)

// limit returns the number of events to return.
func (q Query) limit() int {
	if q.Limit <= 0 {
		return defaultLimit
	}
	return min(q.Limit, maxLimit)
}

// forward reports whether the caller reads on from a place, rather than asking for the newest events.
func (q Query) forward() bool { return q.After > 0 || !q.Since.IsZero() }

// bounded returns e with its texts cut to size, or ErrInvalid for an event without a type.
func bounded(e Event) (Event, error) {
	if e.Type == "" || len(e.Type) > maxType {
		return e, sandbox.Invalidf("event type %.80q: want 1 to %d bytes", e.Type, maxType)
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time = e.Time.UTC()
	e.Message = cut(e.Message, maxMessage)
	if len(e.Fields) == 0 {
		e.Fields = nil
		return e, nil
	}
	fields := make(map[string]string, min(len(e.Fields), maxFields))
	for k, v := range e.Fields {
		if len(fields) == maxFields {
			break
		}
		fields[cut(k, maxType)] = cut(v, maxField)
	}
	e.Fields = fields
	return e, nil
}

// cut returns s as valid UTF-8 of at most limit bytes.
func cut(s string, limit int) string {
	s = strings.ToValidUTF8(s[:min(len(s), 4*limit)], string(utf8.RuneError))
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}
