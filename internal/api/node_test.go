package api_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/client"
)

func TestNodeDrainRoutes(t *testing.T) {
	_, c := newCaller(t)
	n := decode[client.Node](t, c.do("POST", "/v1/nodes/aaaaaa/drain", `{"timeout_seconds":60,"max_parallel":2,"force":true,"reason":"disk"}`))
	if n.State != "draining" || !n.Cordoned || n.Drain == nil || !n.Drain.Force || n.Drain.Deadline.IsZero() || n.CordonReason != "disk" {
		t.Errorf("%+v", n)
	}
	for _, tt := range []struct {
		method, target, body string
		status               int
		want                 string
	}{
		{"POST", "/v1/nodes/aaaaaa/drain", "", 200, `"draining"`},
		{"POST", "/v1/nodes/aaaaaa/drain", `{"max_parallel":99}`, 400, "want 1 to 32"},
		{"POST", "/v1/nodes/aaaaaa/drain", `{"timeout_seconds":-1}`, 400, "-1"},
		{"POST", "/v1/nodes/nobody/drain", `{}`, 404, "nobody"},
		{"PATCH", "/v1/nodes/aaaaaa", `{"cordoned":false}`, 200, `"ready"`},
		{"DELETE", "/v1/nodes/aaaaaa?force=perhaps", "", 400, "true or false"},
		{"DELETE", "/v1/nodes/nobody", "", 404, "nobody"},
		{"DELETE", "/v1/nodes/aaaaaa", "", 204, ""},
		{"GET", "/v1/nodes", "", 200, "[]"},
	} {
		if w := c.do(tt.method, tt.target, tt.body); w.Code != tt.status || !strings.Contains(w.Body.String(), tt.want) {
			t.Errorf("%s %s %s: %d %s", tt.method, tt.target, tt.body, w.Code, w.Body)
		}
	}
}

// TestIdempotencyKeyHeader checks both ways to create a sandbox: a repeat gets the same one, another request is refused.
func TestIdempotencyKeyHeader(t *testing.T) {
	_, c := newCaller(t)
	for _, tt := range []struct{ path, body, other, field string }{
		{"/v1/sandboxes", `{"timeout_seconds":60}`, `{"timeout_seconds":61}`, `"id":"`},
		{"/sandboxes", `{"templateID":"base"}`, `{"templateID":"base","timeout":77}`, `"sandboxID":"`},
	} {
		create := func(body string) *httptest.ResponseRecorder {
			r := httptest.NewRequest(http.MethodPost, tt.path, strings.NewReader(body))
			r.Header.Set("X-Api-Key", c.key)
			r.Header.Set("Idempotency-Key", "key of "+tt.path)
			w := httptest.NewRecorder()
			c.handler.ServeHTTP(w, r)
			return w
		}
		first, again, other := create(tt.body), create(tt.body), create(tt.other)
		_, a, _ := strings.Cut(first.Body.String(), tt.field)
		_, b, _ := strings.Cut(again.Body.String(), tt.field)
		if len(a) < 20 || len(b) < 20 || a[:20] != b[:20] {
			t.Errorf("%s: %s, then %s", tt.path, first.Body, again.Body)
		}
		if other.Code != http.StatusConflict || !strings.Contains(other.Body.String(), "idempotency key") {
			t.Errorf("%s: another request: %d %s", tt.path, other.Code, other.Body)
		}
	}
}
