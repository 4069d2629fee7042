package daemon

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestAPIByName(t *testing.T) {
	answer := func(status int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
	}
	const api, traffic = http.StatusCreated, http.StatusAccepted
	for _, c := range []struct {
		domain, host string
		want         int
	}{
		{"sbx.test", "api.sbx.test", api},
		{"sbx.test", "api.sbx.test:8443", api},
		{"sbx.test:8443", "API.sbx.test.:8443", api},
		{"sbx.test", "49983-ixyz.sbx.test", traffic},
		{"sbx.test", "api.sbx.test.evil.test", traffic},
		{"sbx.test", "api.other.test", traffic},
		{"sbx.test", "sbx.test", traffic},
		{"sbx.test", "", traffic},
		{"sbx.test", "[::1]:8443", traffic},
		{"", "api.sbx.test", traffic},
		{"", "api.", traffic},
	} {
		r := httptest.NewRequest(http.MethodGet, "/health", nil)
		r.Host = c.host
		w := httptest.NewRecorder()
		apiByName(c.domain, answer(api), answer(traffic)).ServeHTTP(w, r)
		if w.Code != c.want {
			t.Errorf("domain %q, host %q: %d, want %d", c.domain, c.host, w.Code, c.want)
		}
	}
}
