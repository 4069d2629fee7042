package proxy

import (
	"context"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// spanKey marks the context of a request that is traced.
type spanKey struct{}

// TestSpans has the fast path tell of each of its requests: what was asked, what came of it, and that what is done for it knows the
// span.
func TestSpans(t *testing.T) {
	if dataPath != HTTP1Fast {
		return // whoever serves the standard path wraps its handler
	}
	type span struct {
		Method, Parent string
		Status         int
	}
	spans, woken := make(chan span, 10), make(chan any, 1)
	r := newRig(t, func(c *Config) {
		c.Trace = func(ctx context.Context, method string, field func(string) string) (context.Context, func(int)) {
			parent := field("traceparent")
			return context.WithValue(ctx, spanKey{}, parent), func(status int) { spans <- span{method, parent, status} }
		}
	})
	r.listen(t, testID, 8000, teapot())
	h := client(t)
	ask := func(want span, header ...string) {
		t.Helper()
		_, _ = do(t, h, r.request(t, want.Method, "/", nil, append(header, "Traceparent", want.Parent)...))
		if diff := cmp.Diff(want, <-spans); diff != "" {
			t.Error(diff)
		}
	}
	ask(span{http.MethodGet, "00-1", http.StatusTeapot}, toGuest("8000")...)
	ask(span{http.MethodDelete, "00-2", http.StatusTeapot}, toGuest("8000")...)
	ask(span{http.MethodGet, "00-3", http.StatusBadGateway}, toGuest("8001")...)
	r.onWake = func(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
		woken <- ctx.Value(spanKey{})
		r.set(id, sandbox.Route{State: sandbox.StateRunning, Generation: 2})
		return r.Route(ctx, id)
	}
	r.set(testID, sandbox.Route{State: sandbox.StatePaused, AutoResume: true, Generation: 1})
	ask(span{http.MethodGet, "00-4", http.StatusTeapot}, toGuest("8000")...)
	if got := <-woken; got != "00-4" {
		t.Errorf("the sandbox was woken for span %v", got)
	}
}
