package api

import (
	"log/slog"
	"net/http"
	"net/http/httptest"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloister-dev/cloister/internal/api/e2b"
	"github.com/cloister-dev/cloister/internal/api/exchange"
	v1 "github.com/cloister-dev/cloister/internal/api/v1"
	"github.com/cloister-dev/cloister/internal/control"
)

// Config is what the edge is made of. All but Domain and Metrics is required.
type Config struct {
	Control *control.Control
	Auth    authenticator
	Log     *slog.Logger
	// Metrics takes the request metrics; nil means that nobody wants them.
	Metrics prometheus.Registerer
	// Domain is what sandboxes' host names end in, with a port where it is not the usual one. Empty leaves clients with
	// what they were configured with.
	Domain string
	// MetricsPage serves GET /metrics to who has a key; nil leaves that out.
	MetricsPage http.Handler
	// Ready is what GET /readyz answers; nil means always.
	Ready func() bool
}

// edge serves requests.
type edge struct {
	auth    authenticator
	log     *slog.Logger
	metrics *metrics
	mux     *http.ServeMux
	routes  map[string]exchange.Route // by pattern
}

// New returns the handler of both APIs. It panics when the metrics are registered already.
func New(cfg Config) http.Handler {
	e := &edge{
		auth: cfg.Auth, log: cfg.Log, metrics: newMetrics(cfg.Metrics),
		mux: http.NewServeMux(), routes: make(map[string]exchange.Route),
	}
	for _, r := range routes(cfg) {
		e.routes[r.Pattern()] = r
		e.mux.Handle(r.Pattern(), e.serve(r))
	}
	return e
}

func routes(cfg Config) []exchange.Route {
	all := []exchange.Route{
		{Method: "GET", Path: "/healthz", Handle: healthz, Public: true},
		{Method: "GET", Path: "/readyz", Handle: readyz(cfg.Ready), Public: true},
	}
	if page := cfg.MetricsPage; page != nil {
		all = append(all, exchange.Route{Method: "GET", Path: "/metrics", Handle: func(w http.ResponseWriter, r *http.Request) error {
			page.ServeHTTP(w, r)
			return nil
		}})
	}
	all = append(all, e2b.Routes(cfg.Control, cfg.Domain)...)
	return append(all, v1.Routes(cfg.Control)...)
}

// healthz says only that the process answers.
func healthz(w http.ResponseWriter, _ *http.Request) error {
	return exchange.Bytes(w, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
}

// readyz says only whether the process should get requests.
func readyz(ready func() bool) exchange.Handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if ready != nil && !ready() {
			return exchange.Bytes(w, http.StatusServiceUnavailable, "text/plain; charset=utf-8", []byte("not ready\n"))
		}
		return healthz(w, r)
	}
}

// ServeHTTP implements http.Handler.
func (e *edge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	handler, pattern := e.mux.Handler(r)
	op := e.begin(w, r, pattern)
	defer op.end()
	if crossOrigin(op.w, r) {
		return
	}
	if pattern == "" {
		e.unmatched(op, handler)
		return
	}
	e.mux.ServeHTTP(op.w, op.request)
}

// unmatched answers in JSON what the mux would answer in text: 404, or 405 with the methods that are allowed. Only who
// has a key learns which of them it is.
func (e *edge) unmatched(op *operation, handler http.Handler) {
	if err := e.authenticate(op); err != nil {
		op.fail(err)
		return
	}
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, op.request)
	for _, name := range []string{"Allow", "Location"} {
		if v := answer.Header().Get(name); v != "" {
			op.w.Header().Set(name, v)
		}
	}
	what := "there is no operation " + op.request.Method + " " + op.request.URL.Path
	if answer.Code == http.StatusMethodNotAllowed {
		what += "; allowed here: " + answer.Header().Get("Allow")
	}
	exchange.FailWith(op.w, answer.Code, what)
}

// serve returns the handler of one route.
func (e *edge) serve(route exchange.Route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		op := operationOf(r)
		if !route.Public {
			if err := e.authenticate(op); err != nil {
				op.fail(err)
				return
			}
		}
		if err := route.Handle(w, r); err != nil {
			op.fail(err)
		}
	})
}
