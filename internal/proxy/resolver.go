package proxy

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// destination is where the data path brings a request.
type destination struct {
	target
	// route is where the sandbox runs.
	route sandbox.Route
	// came is when the request came.
	came time.Time
	// until is when waiting for the sandbox ends; zero while the request has not waited.
	until time.Time
}

// resolver decides where a request goes, or why it goes nowhere. It moves no bytes.
type resolver struct {
	rules      rules
	router     router
	signatures signatures
	waits      *waits
	ready      func() bool
}

// resolve decides for a request of net/http's.
func (rs *resolver) resolve(r *http.Request) (destination, *failure) {
	if r.Method == http.MethodConnect {
		return destination{}, connectRefused()
	}
	h, err := headOf(r)
	if err != nil {
		return destination{}, badRequest(err)
	}
	return rs.resolveHead(r.Context(), h)
}

func connectRefused() *failure {
	return &failure{status: http.StatusMethodNotAllowed, cause: causeBadRequest, message: "CONNECT is not supported: send the request itself"}
}

// resolveHead decides by a head that somebody has read. ctx ends when the client leaves.
func (rs *resolver) resolveHead(ctx context.Context, h head) (destination, *failure) {
	t, err := rs.rules.parse(h)
	if err != nil {
		return destination{}, badRequest(err)
	}
	if t.form == formOwn {
		return destination{}, rs.own(t)
	}
	if t.port == GuestAgentPort && internalRoute(t.path) {
		return destination{}, refusedRoute(t)
	}
	if t.form == formPath && t.path == "/" && t.prefix == h.path && navigates(h.fields) {
		return destination{}, slashMissing(t, h.query)
	}
	return rs.find(ctx, t)
}

// own answers a question to the proxy itself: whether it works, and whether it should get traffic.
func (rs *resolver) own(t target) *failure {
	if t.path == "/readyz" && !rs.ready() {
		return &failure{status: http.StatusServiceUnavailable, message: "not ready"}
	}
	return &failure{status: http.StatusOK, message: "ok"}
}

// find looks the target's sandbox up, and waits for it to take requests.
func (rs *resolver) find(ctx context.Context, t target) (destination, *failure) {
	if t.form == formSignature {
		id, fail := rs.bySignature(ctx, t)
		if fail != nil {
			return destination{}, fail
		}
		t.id = id
	}
	route, err := rs.router.Route(ctx, t.id)
	if err != nil {
		return destination{}, unrouted(ctx, t, err)
	}
	return rs.waits.serving(ctx, destination{target: t, route: route, came: time.Now()})
}

func (rs *resolver) bySignature(ctx context.Context, t target) (sandbox.ID, *failure) {
	if rs.signatures == nil {
		return "", badRequest(sandbox.Invalidf("/files without a sandbox: send %s", headerSandboxID))
	}
	s := t.signed
	id, err := rs.signatures.SandboxBySignature(ctx, s.path, s.op, s.user, s.signature, s.expiration)
	if errors.Is(err, sandbox.ErrNotFound) {
		return "", &failure{status: http.StatusUnauthorized, cause: causeNotFound, port: t.port, message: "The signature matches no running sandbox", err: err}
	}
	if err != nil {
		return "", unrouted(ctx, t, err)
	}
	return id, nil
}
