package e2b

import (
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxBuildLogs is how many lines one answer holds.
const maxBuildLogs = 100

type buildLogWire struct {
	Timestamp time.Time `json:"timestamp"`
	Level     string    `json:"level"`
	Message   string    `json:"message"`
	Step      string    `json:"step,omitempty"`
}

func buildLogToWire(e control.LogEntry) buildLogWire {
	return buildLogWire{Timestamp: stamp(e.Time), Level: e.Level, Message: e.Message, Step: e.Fields["step"]}
}

type reasonWire struct {
	Message    string         `json:"message"`
	Step       string         `json:"step,omitempty"`
	LogEntries []buildLogWire `json:"logEntries"`
}

type buildInfoWire struct {
	TemplateID string         `json:"templateID"`
	BuildID    string         `json:"buildID"`
	Status     string         `json:"status"`
	LogEntries []buildLogWire `json:"logEntries"`
	Logs       []string       `json:"logs"`
	Reason     *reasonWire    `json:"reason,omitempty"`
}

// statusQuery is which lines of a build's log are wanted. The offset counts lines of the level or above.
type statusQuery struct {
	offset int32
	limit  int32
	level  string
}

func readStatusQuery(r *http.Request) (statusQuery, error) {
	values, err := exchange.Query(r)
	if err != nil {
		return statusQuery{}, err
	}
	q := statusQuery{level: values.Get("level")}
	offset, err := exchange.Int(values, "logsOffset", 0, math.MaxInt32, 0)
	if err != nil {
		return statusQuery{}, err
	}
	limit, err := exchange.Int(values, "limit", 0, maxBuildLogs, maxBuildLogs)
	if err != nil {
		return statusQuery{}, err
	}
	if q.level != "" && !slices.Contains(levels, q.level) {
		return statusQuery{}, sandbox.Invalidf("level %.20q: want one of %s", q.level, strings.Join(levels, ", "))
	}
	q.offset, q.limit = int32(offset), int32(limit) //nolint:gosec // bounded above
	return q, nil
}

// buildStatusOf answers what clients poll until the build has ended and they have its whole log.
func (s *server) buildStatusOf(w http.ResponseWriter, r *http.Request) error {
	q, err := readStatusQuery(r)
	if err != nil {
		return err
	}
	t, recorded, err := s.buildOf(r)
	if err != nil {
		return err
	}
	b, err := s.buildLog(r, recorded.ID, q)
	if err != nil {
		return err
	}
	out := buildInfoWire{
		TemplateID: string(t.ID), BuildID: recorded.ID, Status: buildStatus(sandbox.Build{State: b.State}), Logs: []string{},
		LogEntries: make([]buildLogWire, 0, len(b.Entries)),
	}
	for _, e := range b.Entries {
		out.LogEntries = append(out.LogEntries, buildLogToWire(e))
	}
	if b.State == sandbox.BuildFailed {
		out.Reason = &reasonWire{Message: b.Error, Step: b.FailedStep, LogEntries: []buildLogWire{}}
	}
	return exchange.JSON(w, http.StatusOK, out)
}

// buildOf finds the build of the path in its template.
func (s *server) buildOf(r *http.Request) (sandbox.Template, sandbox.Build, error) {
	t, err := s.control.GetTemplate(r.Context(), r.PathValue("id"))
	if err != nil {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	b, ok := t.Build(r.PathValue("build"))
	if !ok {
		return sandbox.Template{}, sandbox.Build{}, sandbox.NotFoundf("build %.80q of template %s was not found", r.PathValue("build"), t.ID)
	}
	return t, b, nil
}

// buildLog returns a build with the lines that are wanted.
func (s *server) buildLog(r *http.Request, id string, q statusQuery) (control.Build, error) {
	if q.level == "" && q.limit > 0 {
		return s.control.GetBuild(r.Context(), control.BuildQuery{ID: id, Offset: q.offset, Limit: q.limit})
	}
	b, err := s.control.GetBuild(r.Context(), control.BuildQuery{ID: id})
	if err != nil {
		return control.Build{}, err
	}
	least := slices.Index(levels, q.level)
	b.Entries = slices.DeleteFunc(b.Entries, func(e control.LogEntry) bool { return slices.Index(levels, e.Level) < least })
	b.Entries = b.Entries[min(int(q.offset), len(b.Entries)):]
	b.Entries = b.Entries[:min(int(q.limit), len(b.Entries))]
	return b, nil
}

// buildLogs returns a build's log by time, forward from the cursor or backward from it.
func (s *server) buildLogs(w http.ResponseWriter, r *http.Request) error {
	q, err := readLogQuery(r)
	if err != nil {
		return err
	}
	_, recorded, err := s.buildOf(r)
	if err != nil {
		return err
	}
	b, err := s.control.GetBuild(r.Context(), control.BuildQuery{ID: recorded.ID})
	if err != nil {
		return err
	}
	if q.backward {
		slices.Reverse(b.Entries)
	}
	out := struct {
		Logs []buildLogWire `json:"logs"`
	}{Logs: []buildLogWire{}}
	for _, e := range b.Entries {
		early := !q.backward && e.Time.Before(q.cursor)
		if !early && q.matches(e) && len(out.Logs) < min(q.limit, maxBuildLogs) {
			out.Logs = append(out.Logs, buildLogToWire(e))
		}
	}
	return exchange.JSON(w, http.StatusOK, out)
}
