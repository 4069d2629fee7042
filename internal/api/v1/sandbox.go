package v1

import (
	"net/http"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// defaultTimeout is the life of a sandbox that names none, in seconds.
const defaultTimeout = 300

// never is the timeout in seconds of a sandbox that does not end by itself.
const never = -1

func (s *server) listSandboxes(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	q := control.ListQuery{Next: values.Get("next"), Template: values.Get("template")}
	for name := range strings.SplitSeq(strings.Join(values["state"], ","), ",") {
		if name != "" {
			q.States = append(q.States, sandbox.State(name))
		}
	}
	if q.Metadata, err = parseMetadata(values["metadata"]); err != nil {
		return err
	}
	limit, err := exchange.Int(values, "limit", 1, control.MaxPage, 100)
	if err != nil {
		return err
	}
	q.Limit = int(limit)
	page, err := s.control.List(r.Context(), q)
	if err != nil {
		return err
	}
	if page.Next != "" {
		w.Header().Set(client.NextTokenHeader, page.Next)
	}
	return exchange.JSON(w, http.StatusOK, each(page.Sandboxes, sandboxToWire))
}

// parseMetadata reads metadata=key=value, which may be given several times.
func parseMetadata(values []string) (map[string]string, error) {
	const most = 64
	if len(values) > most {
		return nil, sandbox.Invalidf("%d metadata filters: want at most %d", len(values), most)
	}
	out := make(map[string]string, len(values))
	for _, v := range values {
		key, value, ok := strings.Cut(v, "=")
		if !ok || key == "" {
			return nil, sandbox.Invalidf("metadata %.80q: want key=value", v)
		}
		out[key] = value
	}
	return out, nil
}

func (s *server) createSandbox(w http.ResponseWriter, r *http.Request) error {
	var body client.CreateSandbox
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	life, err := lifetimeOrDefault(body.TimeoutSeconds)
	if err != nil {
		return err
	}
	box, err := s.control.Create(r.Context(), control.CreateRequest{
		Template: body.Template, Metadata: body.Metadata, Env: body.Env, Timeout: life,
		Resources: sandbox.Resources(body.Resources), Secure: true,
		AllowInternet: body.AllowInternet == nil || *body.AllowInternet, IdempotencyKey: r.Header.Get("Idempotency-Key"),
		AutoPause: body.AutoPause, AutoPauseKind: sandbox.CheckpointKind(body.AutoPauseKind),
		AutoResume: body.AutoResume, IdleTimeout: body.IdleTimeout,
	})
	if err != nil {
		return err
	}
	return s.oneSandbox(w, http.StatusCreated, box)
}

// oneSandbox answers with a sandbox and its token.
func (s *server) oneSandbox(w http.ResponseWriter, status int, box sandbox.Sandbox) error {
	wire := sandboxToWire(box)
	wire.AccessToken = s.control.AccessToken(box)
	return exchange.JSON(w, status, wire)
}

// lifetimeOrDefault reads a number of seconds, of which 0 means the default.
func lifetimeOrDefault(seconds int64) (time.Duration, error) {
	if seconds == 0 {
		seconds = defaultTimeout
	}
	return lifetime(seconds)
}

// lifetime reads a number of seconds, of which -1 means never.
func lifetime(seconds int64) (time.Duration, error) {
	switch {
	case seconds == never:
		return control.Never, nil
	case seconds < never:
		return 0, sandbox.Invalidf("timeout_seconds %d: want a number of seconds, or -1 for never", seconds)
	}
	return exchange.Seconds("timeout_seconds", seconds)
}

// sandboxID reads the path's id; what can be none is not found.
func sandboxID(r *http.Request) (sandbox.ID, error) {
	id, err := sandbox.ParseID(r.PathValue("id"))
	if err != nil {
		return "", sandbox.NotFoundf("sandbox %.80q was not found", r.PathValue("id"))
	}
	return id, nil
}

func (s *server) getSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	box, err := s.control.Get(r.Context(), id)
	if err != nil {
		return err
	}
	return s.oneSandbox(w, http.StatusOK, box)
}

func (s *server) killSandbox(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if err := s.control.Kill(r.Context(), id); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func (s *server) setTimeout(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	var body struct {
		client.SetTimeout
		TimeoutSeconds *int64 `json:"timeout_seconds"`
	}
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	if body.TimeoutSeconds == nil {
		return sandbox.Invalidf("timeout_seconds is missing: want a number of seconds, 0 to end it now, or -1 for never")
	}
	life, err := lifetime(*body.TimeoutSeconds)
	if err != nil {
		return err
	}
	move := s.control.SetTimeout
	if body.ExtendOnly {
		move = s.control.Extend
	}
	box, err := move(r.Context(), id, life)
	if err != nil {
		return err
	}
	return s.oneSandbox(w, http.StatusOK, box)
}

func (s *server) logs(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	start, err := exchange.Time(values, "start")
	if err != nil {
		return err
	}
	limit, err := exchange.Int(values, "limit", 1, control.MaxLogEntries, 1000)
	if err != nil {
		return err
	}
	entries, err := s.control.Logs(r.Context(), id, start, int(limit))
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(entries, logToWire))
}

func (s *server) metrics(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	start, err := exchange.Time(values, "start")
	if err != nil {
		return err
	}
	end, err := exchange.Time(values, "end")
	if err != nil {
		return err
	}
	samples, err := s.control.Metrics(r.Context(), id, start, end)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(samples, metricToWire))
}
