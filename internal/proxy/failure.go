package proxy

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// cause classifies failures for metrics and logs.
type cause string

const (
	causeBadRequest    cause = "bad_request"
	causeNotFound      cause = "not_found"
	causeNotRunning    cause = "not_running"
	causeTransitioning cause = "transitioning"
	causeInternalRoute cause = "internal_route"
	causePortClosed    cause = "port_closed"
	causeTooMany       cause = "too_many"
	causeExhausted     cause = "exhausted"
	causeEnded         cause = "ended"
	causeGuest         cause = "guest"
	causeUnreachable   cause = "unreachable"
	causeTimeout       cause = "timeout"
	causeClientGone    cause = "client_gone"
	causeShutdown      cause = "shutdown"
)

// statusClientGone stands for a request whose client has left; it is counted and never sent.
const statusClientGone = 499

// failure is the proxy's own answer in a guest's stead. The status carries meaning for the E2B SDKs: 502 says that the
// sandbox does not run, so what may pass is 409, 429, 503 or 504.
type failure struct {
	status  int
	cause   cause
	id      sandbox.ID
	port    uint16
	message string // for people; SDKs show it
	title   string // of the page that a browser shows; empty means the status
	// location makes the answer a redirection.
	location string
	err      error // for the log
}

func badRequest(err error) *failure {
	return &failure{status: http.StatusBadRequest, cause: causeBadRequest, message: err.Error()}
}

func refusedRoute(t target) *failure {
	return &failure{
		status: http.StatusNotFound, cause: causeInternalRoute, id: t.id, port: t.port,
		message: "This route is internal to the cluster and cannot be reached through the proxy",
	}
}

func slashMissing(t target, query string) *failure {
	location := t.prefix + "/"
	if query != "" {
		location += "?" + query
	}
	return &failure{status: http.StatusTemporaryRedirect, id: t.id, port: t.port, location: location, message: "See " + location}
}

func notFound(t target, err error) *failure {
	return &failure{status: http.StatusBadGateway, cause: causeNotFound, id: t.id, port: t.port, title: "Sandbox Not Found", message: "The sandbox was not found", err: err}
}

// portClosed's message and title are asserted by the SDK's own tests.
func portClosed(t target, err error) *failure {
	return &failure{
		status: http.StatusBadGateway, cause: causePortClosed, id: t.id, port: t.port, title: "Closed Port Error",
		message: "The sandbox is running but port is not open", err: err,
	}
}

// unrouted answers when the router gave an error.
func unrouted(ctx context.Context, t target, err error) *failure {
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		return notFound(t, err)
	case errors.Is(err, sandbox.ErrInvalid):
		return badRequest(err)
	case ctx.Err() != nil:
		return clientGone(t, err)
	}
	return unreachable(t, err)
}

func unreachable(t target, err error) *failure {
	return &failure{
		status: http.StatusServiceUnavailable, cause: causeUnreachable, id: t.id, port: t.port,
		message: "The sandbox cannot be reached now. Try again in a moment.", err: err,
	}
}

func tooMany(t target) *failure {
	return &failure{
		status: http.StatusTooManyRequests, cause: causeTooMany, id: t.id, port: t.port,
		message: "The sandbox has too many open requests. Try again when some have ended.",
	}
}

// overdue answers when a sandbox did not come to run while a request could wait.
func overdue(t target, state sandbox.State, err error) *failure {
	return &failure{
		status: http.StatusServiceUnavailable, cause: causeTransitioning, id: t.id, port: t.port, title: "Sandbox In Transition",
		message: fmt.Sprintf("The sandbox is still %s. Try again in a moment.", state), err: err,
	}
}

// noRoom answers when a paused sandbox cannot be resumed.
func noRoom(t target, err error) *failure {
	return &failure{
		status: http.StatusServiceUnavailable, cause: causeExhausted, id: t.id, port: t.port, title: "No Room",
		message: "The sandbox is paused, and there is no room to resume it. Try again in a moment.", err: err,
	}
}

func shuttingDown(t target, err error) *failure {
	return &failure{
		status: http.StatusServiceUnavailable, cause: causeShutdown, id: t.id, port: t.port,
		message: "The proxy is shutting down. Try again in a moment.", err: err,
	}
}

func clientGone(t target, err error) *failure {
	return &failure{status: statusClientGone, cause: causeClientGone, id: t.id, port: t.port, err: err}
}

// notServing returns nil for a sandbox that takes requests.
func notServing(t target, r sandbox.Route) *failure {
	f := &failure{status: http.StatusBadGateway, cause: causeNotRunning, id: t.id, port: t.port, title: "Sandbox Not Running"}
	switch r.State {
	case sandbox.StateRunning:
		return nil
	case sandbox.StateCreating, sandbox.StatePausing, sandbox.StateResuming, sandbox.StateMigrating:
		f.status, f.cause, f.title = http.StatusConflict, causeTransitioning, "Sandbox In Transition"
		f.message = "The sandbox is still transitioning. Try again in a moment."
	case sandbox.StateFailed:
		f.message = withReason("The sandbox failed", r.Reason)
	case sandbox.StateLost:
		f.message = withReason("The sandbox was lost", r.Reason)
	case sandbox.StatePaused, sandbox.StateStopping, sandbox.StateStopped:
		f.message = withReason("The sandbox is "+string(r.State), r.Reason)
	case sandbox.StateDeleted:
		return notFound(t, nil)
	default:
		return unreachable(t, fmt.Errorf("sandbox %s: unknown state %q", t.id, r.State))
	}
	return f
}

func withReason(text, reason string) string {
	if reason == "" {
		return text
	}
	return text + ": " + reason
}

// wireFailure is the JSON form, as the E2B SDKs read it.
type wireFailure struct {
	SandboxID string `json:"sandboxId"`
	Message   string `json:"message"`
	Port      uint16 `json:"port,omitempty"`
	Code      int    `json:"code"`
}

//go:embed failure.html
var failurePage string

//nolint:gochecknoglobals // parsed once, never written
var failureTemplate = template.Must(template.New("failure").Parse(failurePage))

// write answers r: with JSON, with a page where a browser wants one, or, to a browser that asks whether it may send the
// real request, with a yes, so that the script that sends it can read what is wrong.
func (f *failure) write(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Cache-Control", "no-store")
	if preflight(r) {
		h.Set("Access-Control-Allow-Methods", "*")
		h.Set("Access-Control-Allow-Headers", orAny(r.Header.Get("Access-Control-Request-Headers")))
		h.Set("Access-Control-Max-Age", "600")
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if f.location != "" {
		h.Set("Location", f.location)
	}
	if f.status == http.StatusConflict || f.status == http.StatusTooManyRequests || f.status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	body, contentType := f.body(r)
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors *")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(f.status)
	_, _ = w.Write(body) //nolint:gosec // a template or JSON has escaped it; a client that has left needs no answer
}

func orAny(headers string) string {
	if headers == "" {
		return "*"
	}
	return headers
}

// body returns the answer and its content type.
func (f *failure) body(r *http.Request) ([]byte, string) {
	if f.status >= http.StatusBadRequest && navigates(r.Header) {
		var page bytes.Buffer
		if err := failureTemplate.Execute(&page, f.page(r.Host)); err == nil {
			return page.Bytes(), "text/html; charset=utf-8"
		}
	}
	wire := wireFailure{SandboxID: string(f.id), Message: f.message, Code: f.status}
	if f.cause == causePortClosed {
		wire.Port = f.port
	}
	body, err := json.Marshal(wire)
	if err != nil { // cannot happen: strings and numbers always encode
		body = []byte(`{"message":"internal error","code":500}`)
	}
	return body, "application/json; charset=utf-8"
}

// page is what failure.html shows.
type page struct {
	Title, Message, Host, SandboxID string
	Port                            uint16
	Status                          int
	PortClosed                      bool
}

func (f *failure) page(host string) page {
	title := f.title
	if title == "" {
		title = http.StatusText(f.status)
	}
	return page{
		Title: title, Message: f.message, Host: host, SandboxID: string(f.id),
		Port: f.port, Status: f.status, PortClosed: f.cause == causePortClosed,
	}
}

// preflight reports whether a browser asks if it may send another request.
func preflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != ""
}

// navigates reports whether a person is to see the answer, rather than a program. Browsers say so; of those that do not,
// a browser's name without any mark of a script's request counts.
func navigates(h fields) bool {
	if mode := h.Get("Sec-Fetch-Mode"); mode == "navigate" {
		return true
	}
	accept := h.Get("Accept")
	if strings.Contains(accept, "text/html") {
		return true
	}
	if h.Get("Origin") != "" || h.Get("Sec-Fetch-Site") != "" || h.Get("Upgrade") != "" || h.Get("X-Access-Token") != "" || h.Get("Connect-Protocol-Version") != "" {
		return false
	}
	return strings.HasPrefix(h.Get("User-Agent"), "Mozilla/") && (accept == "" || strings.Contains(accept, "*/*"))
}
