package api_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/api"
	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// caller sends requests to a handler.
type caller struct {
	handler http.Handler
	key     string
}

func newCaller(tb testing.TB) (*apitest.Cluster, *caller) {
	tb.Helper()
	c := apitest.NewCluster(tb, nil)
	return c, &caller{handler: c.Handler(), key: c.Key(tb)}
}

func (c *caller) do(method, target, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.ContentLength = -1 // clients send their bodies chunked
	if c.key != "" {
		r.Header.Set("X-API-KEY", c.key)
	}
	w := httptest.NewRecorder()
	c.handler.ServeHTTP(w, r)
	return w
}

func decode[T any](t *testing.T, w *httptest.ResponseRecorder) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
		t.Fatalf("%d %q: %v", w.Code, w.Body, err)
	}
	return v
}

type failure struct {
	Code    int
	Message string
}

// create makes a sandbox and returns its id.
func (c *caller) create(t *testing.T, body string) string {
	t.Helper()
	w := c.do("POST", "/v2/sandboxes", body)
	if w.Code != http.StatusCreated {
		t.Fatalf("create: %d %s", w.Code, w.Body)
	}
	return decode[struct{ SandboxID string }](t, w).SandboxID
}

const absent = "iaaaaaaxxxxxxxxxxxxx"

func TestDefaultTimeouts(t *testing.T) {
	_, c := newCaller(t)
	for target, want := range map[string]time.Duration{"/v2/sandboxes": 300 * time.Second, "/sandboxes": 15 * time.Second} {
		w := c.do("POST", target, `{"templateID":"base"}`)
		id := decode[struct{ SandboxID string }](t, w).SandboxID
		d := decode[struct{ StartedAt, EndAt time.Time }](t, c.do("GET", "/sandboxes/"+id, ""))
		if got := d.EndAt.Sub(d.StartedAt); got != want {
			t.Errorf("%s: lives for %v, want %v", target, got, want)
		}
	}
	w := c.do("POST", "/sandboxes", `{"templateID":"base"}`)
	if strings.Contains(w.Body.String(), "envdAccessToken") {
		t.Errorf("an open sandbox has a token: %s", w.Body)
	}
}

func TestMetadataFilter(t *testing.T) {
	_, c := newCaller(t)
	metadata := map[string]string{"k a": "v&1", "plus+": "100%", "ünï": "=;,"}
	body, err := json.Marshal(map[string]any{"templateID": "base", "metadata": metadata})
	if err != nil {
		t.Fatal(err)
	}
	id := c.create(t, string(body))
	c.create(t, `{"templateID":"base"}`)
	// As on the wire.
	for _, filter := range []string{"k%252520a%3Dv%2525261", wireFilter(metadata)} {
		w := c.do("GET", "/v2/sandboxes?metadata="+filter, "")
		got := decode[[]struct {
			SandboxID string
			Metadata  map[string]string
		}](t, w)
		if len(got) != 1 || got[0].SandboxID != id || got[0].Metadata["k a"] != "v&1" || w.Header().Get("X-Total-Running") != "1" {
			t.Errorf("%s: %s", filter, w.Body)
		}
	}
}

// wireFilter encodes a filter three times over, as clients do.
func wireFilter(m map[string]string) string {
	inner := url.Values{}
	for k, v := range m {
		inner.Set(url.PathEscape(k), strings.ReplaceAll(url.PathEscape(v), "+", "%2B"))
	}
	return url.QueryEscape(inner.Encode())
}

func TestPagination(t *testing.T) {
	_, c := newCaller(t)
	for range 5 {
		c.create(t, `{"templateID":"base"}`)
	}
	seen, token := 0, ""
	for {
		w := c.do("GET", "/v2/sandboxes?limit=2&state=running&nextToken="+token, "")
		if w.Header().Get("X-Total-Running") != "5" {
			t.Errorf("X-Total-Running %q", w.Header().Get("X-Total-Running"))
		}
		seen += len(decode[[]any](t, w))
		if token = w.Header().Get("X-Next-Token"); token == "" {
			break
		}
	}
	if seen != 5 {
		t.Errorf("saw %d", seen)
	}
	if w := c.do("GET", "/v2/sandboxes?state=paused", ""); w.Header().Get("X-Total-Running") != "" {
		t.Error("X-Total-Running although running ones were not asked for")
	}
}

func TestAuthentication(t *testing.T) {
	cluster, c := newCaller(t)
	good := c.key
	tests := []struct {
		name, header, value string
		status              int
	}{
		{"none", "X-Other", "x", 401},
		{"key", "X-API-KEY", good, 200},
		{"bearer", "Authorization", "Bearer " + good, 200},
		{"lower-case bearer", "Authorization", "bearer " + good, 200},
		{"wrong key", "X-API-KEY", "e2b_" + strings.Repeat("0", 40), 401},
		{"basic", "Authorization", "Basic " + good, 401},
		{"empty bearer", "Authorization", "Bearer ", 401},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, target := range []string{"/v2/sandboxes", "/v1/status", "/templates", "/v1/openapi.json"} {
				r := httptest.NewRequest(http.MethodGet, target, nil)
				r.Header.Set(tt.header, tt.value)
				w := httptest.NewRecorder()
				c.handler.ServeHTTP(w, r)
				if w.Code != tt.status {
					t.Errorf("%s: %d %s", target, w.Code, w.Body)
				}
				if w.Code == 401 && decode[failure](t, w).Code != 401 {
					t.Errorf("%s: %s", target, w.Body)
				}
			}
		})
	}
	t.Run("every other route", func(t *testing.T) {
		c.key = ""
		for _, target := range []string{"GET /nothing", "PUT /sandboxes", "DELETE /sandboxes/x", "POST /v1/keys", "GET /teams", "POST /volumes"} {
			method, path, _ := strings.Cut(target, " ")
			if w := c.do(method, path, "{}"); w.Code != 401 {
				t.Errorf("%s: %d", target, w.Code)
			}
		}
	})
	t.Run("local socket", func(t *testing.T) {
		r := httptest.NewRequest(http.MethodGet, "/v1/status", nil)
		w := httptest.NewRecorder()
		c.handler.ServeHTTP(w, r.WithContext(api.WithLocalAdmin(r.Context())))
		if w.Code != 200 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
	t.Run("revoked", func(t *testing.T) {
		if err := cluster.Records.RevokeKey(t.Context(), "key1"); err != nil {
			t.Fatal(err)
		}
		c.key = good
		if w := c.do("GET", "/v1/status", ""); w.Code != 401 {
			t.Errorf("%d", w.Code)
		}
	})
}

func TestNoCapacity(t *testing.T) {
	cluster, c := newCaller(t)
	cluster.Node.Room = 1
	c.create(t, `{"templateID":"base"}`)
	w := c.do("POST", "/v2/sandboxes", `{"templateID":"base"}`)
	if n, err := strconv.Atoi(w.Header().Get("Retry-After")); w.Code != 503 || err != nil || n < 1 {
		t.Errorf("%d, Retry-After %q: %s", w.Code, w.Header().Get("Retry-After"), w.Body)
	}
	cluster.Agents.Set("aaaaaa", nil)
	if w = c.do("POST", "/v2/sandboxes", `{"templateID":"base"}`); w.Code != 503 || !strings.Contains(w.Body.String(), "not connected") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestFailedSandboxShowsItsReason(t *testing.T) {
	cluster, c := newCaller(t)
	id := c.create(t, `{"templateID":"base"}`)
	cluster.Node.Crash(sandbox.ID(id), "out of memory: limit 512 MiB")
	if err := cluster.Report(t, cluster.Node, false); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"/sandboxes/" + id, "/v1/sandboxes/" + id} {
		w := c.do("GET", target, "")
		got := decode[struct{ State, Reason string }](t, w)
		if w.Code != 200 || got.State != "failed" || got.Reason != "out of memory: limit 512 MiB" {
			t.Errorf("%s: %d %s", target, w.Code, w.Body)
		}
	}
	if w := c.do("POST", "/v2/sandboxes/"+id+"/connect", ""); w.Code != 404 || !strings.Contains(w.Body.String(), "out of memory") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if got := decode[[]any](t, c.do("GET", "/v2/sandboxes", "")); len(got) != 0 {
		t.Errorf("listed: %v", got)
	}
	if got := decode[[]any](t, c.do("GET", "/v1/sandboxes?state=failed", "")); len(got) != 1 {
		t.Errorf("listed: %v", got)
	}
}

func TestInternalErrorsAndPanics(t *testing.T) {
	cluster := apitest.NewCluster(t, nil)
	var log bytes.Buffer
	registry := prometheus.NewRegistry()
	handler := api.New(api.Config{
		Control: cluster.Control, Auth: cluster.Records, Log: slog.New(slog.NewJSONHandler(&log, nil)), Metrics: registry,
	})
	c := &caller{handler: handler, key: cluster.Key(t)}
	cluster.Node.Fail(connect.NewError(connect.CodeInternal, errors.New("secret detail")))
	w := c.do("POST", "/v2/sandboxes", `{"templateID":"base"}`)
	if w.Code != 500 || strings.Contains(w.Body.String(), "secret") || !strings.Contains(w.Body.String(), w.Header().Get("X-Request-Id")) {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if !strings.Contains(log.String(), "secret detail") || !strings.Contains(log.String(), `"level":"ERROR"`) {
		t.Errorf("log %s", &log)
	}
	log.Reset()
	broken := &caller{handler: api.New(api.Config{Auth: cluster.Records, Log: slog.New(slog.NewJSONHandler(&log, nil))}), key: c.key}
	if w = broken.do("GET", "/v1/status", ""); w.Code != 500 || decode[failure](t, w).Code != 500 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if !strings.Contains(log.String(), "panic") || strings.Contains(log.String(), c.key) {
		t.Errorf("log %s", &log)
	}
	if n, err := testutil.GatherAndCount(registry, "cloister_api_requests_total", "cloister_api_request_seconds"); err != nil || n != 2 {
		t.Errorf("%d series, %v", n, err)
	}
}

func TestLimits(t *testing.T) {
	_, c := newCaller(t)
	w := c.do("POST", "/v2/sandboxes", `{"templateID":"base","x":"`+strings.Repeat("a", 1<<20)+`"}`)
	if w.Code != http.StatusRequestEntityTooLarge || decode[failure](t, w).Code != w.Code {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestCrossOrigin(t *testing.T) {
	_, c := newCaller(t)
	r := httptest.NewRequest(http.MethodOptions, "/v2/sandboxes", nil)
	r.Header.Set("Origin", "https://example.com")
	r.Header.Set("Access-Control-Request-Method", "POST")
	r.Header.Set("Access-Control-Request-Headers", "x-api-key,content-type")
	w := httptest.NewRecorder()
	c.handler.ServeHTTP(w, r)
	if w.Code != 204 || w.Header().Get("Access-Control-Allow-Origin") != "*" || w.Header().Get("Access-Control-Allow-Headers") != "x-api-key,content-type" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
}

// TestOverHTTP checks what only a real connection shows.
func TestOverHTTP(t *testing.T) {
	cluster := apitest.NewCluster(t, nil)
	base, key := cluster.Serve(t)
	client := &http.Client{}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/v2/sandboxes", io.NopCloser(strings.NewReader(`{"templateID":"base"}`)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-KEY", key)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusCreated || resp.ContentLength <= 0 {
		t.Errorf("%d, length %d", resp.StatusCode, resp.ContentLength)
	}
}
