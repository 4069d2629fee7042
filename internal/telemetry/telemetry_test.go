package telemetry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/telemetry"
)

func TestSecretsAreHidden(t *testing.T) {
	const key = "e2b_0123456789abcdef0123456789abcdef01234567"
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		log, err := telemetry.NewLogger(telemetry.Logging{Writer: &out, Level: "debug", Format: format})
		if err != nil {
			t.Fatal(err)
		}
		//nolint:sloglint // a header's name must hide its value too
		log.Info("key "+key, slog.String("api_key", "hush1"), slog.String("Authorization", "hush2"), slog.Any("err", errors.New("bad "+key)),
			slog.String("text", "uses "+key), slog.Group("in", slog.String("password", "hush3")), slog.String("key_id", "shown"), slog.Int("n", 7),
			slog.Any("list", []string{"uses " + key}), slog.Any("raw", []byte(key)), slog.Any("map", map[string]string{"k": key}))
		text := out.String()
		for _, secret := range []string{key, "hush1", "hush2", "hush3"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s log holds the secret %q: %s", format, secret, text)
			}
		}
		if !strings.Contains(text, "shown") {
			t.Errorf("%s log lacks what is no secret: %s", format, text)
		}
	}
}

func TestLoggerRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, l := range []telemetry.Logging{{Writer: io.Discard, Level: "loud"}, {Writer: io.Discard, Format: "xml"}} {
		if _, err := telemetry.NewLogger(l); err == nil {
			t.Errorf("NewLogger(%+v): no error", l)
		}
	}
}

func TestDebugHandler(t *testing.T) {
	srv := httptest.NewServer(telemetry.DebugHandler(telemetry.NewRegistry()))
	defer srv.Close()
	for path, want := range map[string]string{"/metrics": "go_goroutines", "/debug/pprof/": "goroutine", "/debug/pprof/cmdline": "telemetry"} {
		if code, text := get(t, srv.URL+path, ""); code != http.StatusOK || !strings.Contains(text, want) {
			t.Errorf("GET %s: %d, without %q", path, code, want)
		}
	}
	for host, want := range map[string]int{"localhost:1": http.StatusOK, "[::1]": http.StatusOK, "evil.example": http.StatusForbidden, "10.0.0.1": http.StatusForbidden} {
		if code, _ := get(t, srv.URL+"/metrics", host); code != want {
			t.Errorf("GET /metrics with host %s: %d, want %d", host, code, want)
		}
	}
}

func get(t *testing.T, url, host string) (code int, text string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// TestDebugHandlerBeyondLoopback asks through a listener that other machines could reach.
func TestDebugHandlerBeyondLoopback(t *testing.T) {
	h := telemetry.DebugHandler(telemetry.NewRegistry())
	for _, local := range []string{"10.0.0.1:6060", "127.0.0.1:6060"} {
		at := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local))
		req := httptest.NewRequest(http.MethodGet, "http://localhost/metrics", http.NoBody) // from 192.0.2.1
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req.WithContext(context.WithValue(req.Context(), http.LocalAddrContextKey, net.Addr(at))))
		if w.Code != http.StatusForbidden {
			t.Errorf("a request from another machine to %s: %d, want 403", local, w.Code)
		}
	}
}

func TestTracesReachTheCollector(t *testing.T) {
	got := make(chan string, 1)
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got <- r.URL.Path + " " + string(body)
	}))
	defer collector.Close()
	stop, err := telemetry.StartTracing(t.Context(), telemetry.Tracing{Endpoint: collector.URL, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	h := telemetry.Traced(http.NotFoundHandler(), func(*http.Request) string { return "GET /some/pattern" })
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/some/1", http.NoBody))
	streams := telemetry.Traced(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if _, ok := w.(http.Flusher); !ok {
			t.Error("a traced handler cannot flush")
		}
	}), func(*http.Request) string { return "stream" })
	streams.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/stream", http.NoBody))
	_, end := telemetry.SpanOf(t.Context(), "proxy PUT", http.MethodPut, http.Header{
		"Traceparent": {"00-6162636465666768696a6b6c6d6e6f70-7172737475767778-01"},
	}.Get)
	end(http.StatusBadGateway)
	if err := stop(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	text := <-got
	if !strings.HasPrefix(text, "/v1/traces ") || !strings.Contains(text, "GET /some/pattern") {
		t.Errorf("the collector got %q", text)
	}
	if !strings.Contains(text, "proxy PUT") || !strings.Contains(text, "abcdefghijklmnop") || !strings.Contains(text, http.StatusText(http.StatusBadGateway)) {
		t.Errorf("the span of a request that no handler answers, of its caller's trace: %q", text)
	}
}
