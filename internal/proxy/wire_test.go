package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

func (r *rig) dialRaw(tb testing.TB) net.Conn {
	tb.Helper()
	c, err := (&net.Dialer{}).DialContext(tb.Context(), "tcp", r.addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return c
}

// TestHostileHeads sends bytes that two readers could understand in two ways, or that are too many.
func TestHostileHeads(t *testing.T) {
	r := newRig(t, nil)
	var reached atomic.Int64
	r.listen(t, testID, 8000, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	routing := "E2b-Sandbox-Id: " + string(testID) + "\r\nE2b-Sandbox-Port: 8000\r\n"
	tests := []struct {
		name, bytes string
		want        int
	}{
		{"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + routing + "\r\n", 400},
		{"no host", "GET / HTTP/1.1\r\n" + routing + "\r\n", 400},
		{"unknown coding", "POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n" + routing + "\r\n", 501},
		{"two codings", "POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n" + routing + "\r\n", 501},
		{"two lengths", "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n" + routing + "\r\nab", 400},
		{"signed length", "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n" + routing + "\r\na", 400},
		{"space before colon", "GET / HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id : " + string(testID) + "\r\n\r\n", 400},
		{"folded header", "GET / HTTP/1.1\r\nHost: localhost\r\n" + routing + "X: a\r\n b\r\n\r\n", byPath(200, 400)},
		{"opaque target", "POST http:init HTTP/1.1\r\nHost: localhost\r\n" + routing + "\r\n", 400},
		{"no path", "GET x HTTP/1.1\r\nHost: localhost\r\n" + routing + "\r\n", 400},
		{"star", "GET * HTTP/1.1\r\nHost: localhost\r\n" + routing + "\r\n", 400},
		{"connect", "CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: 10.0.0.1:22\r\n" + routing + "\r\n", 405},
		{"long header", "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + strings.Repeat("x", maxHeaderBytes+8<<10) + "\r\n\r\n", 431},
		{"many headers", "GET / HTTP/1.1\r\nHost: localhost\r\n" + strings.Repeat("X: x\r\n", maxHeaderBytes/4) + "\r\n", 431},
		{"HTTP/1.0", "GET / HTTP/1.0\r\nHost: localhost\r\n" + routing + "\r\n", 200},
		{"HTTP/3.7", "GET / HTTP/3.7\r\nHost: localhost\r\n" + routing + "\r\n", 505},
		{"absolute form wins over Host", "GET http://localhost/ HTTP/1.1\r\nHost: nobody.test\r\n" + routing + "\r\n", 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			reached.Store(0)
			conn := r.dialRaw(t)
			go func() { _, _ = io.WriteString(conn, tt.bytes) }()
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = res.Body.Close()
			if res.StatusCode != tt.want {
				t.Errorf("status %d, want %d", res.StatusCode, tt.want)
			}
			if (reached.Load() == 1) != (tt.want == 200) {
				t.Errorf("%d requests reached the guest", reached.Load())
			}
		})
	}
}

// byPath chooses what a test wants of net/http's data path and of the fast one.
func byPath[T any](standard, fast T) T {
	if dataPath == HTTP1Standard {
		return standard
	}
	return fast
}

// TestLengthAndCoding: of a length and a chunked coding net/http takes the latter, and only that reaches the guest.
func TestLengthAndCoding(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		_, _ = fmt.Fprintf(w, "%s %v %q", q.URL.Path, q.TransferEncoding, body)
	}))
	conn := r.dialRaw(t)
	_, _ = fmt.Fprintf(conn, "POST /a HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: 8000\r\n"+
		"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nZ\r\n0\r\n\r\n", testID)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if dataPath == HTTP1Fast {
		if res.StatusCode != http.StatusBadRequest || !res.Close {
			t.Errorf("status %d, close %v, want a refusal", res.StatusCode, res.Close)
		}
		return
	}
	if got, want := string(body), `/a [chunked] "Z"`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestInternalRoutesAreOutOfReach tries to reach what only a node may, on a mux like the agent's.
func TestInternalRoutesAreOutOfReach(t *testing.T) {
	r := newRig(t, nil)
	var reached atomic.Bool
	mux := http.NewServeMux()
	for _, pattern := range []string{"POST /init", "POST /copy", "POST /accounts", "GET /logs", "GET /loopback", "/freeze", "/fsfreeze", "/fsthaw"} {
		mux.HandleFunc(pattern, func(http.ResponseWriter, *http.Request) { reached.Store(true) })
	}
	mux.HandleFunc("/health", func(http.ResponseWriter, *http.Request) {})
	r.listen(t, testID, GuestAgentPort, mux)

	targets := []string{
		"/init", "/init/", "//init", "///init", "/./init", "/../init", "/x/../init", "/x/%2e%2e/init", "/%69nit", "/%49nit", "/INIT", "/%2finit",
		"/%2Finit", "/init%2f", "/init%2F..%2Finit", "/init?x=1", "/init#x", "/init;v=1", "/;/init", "/init%3bx", "/init%00", "/init%20", "/init.", `/\init`,
		"/%5cinit", "/%2569nit", "/%252569nit", "/health/../init", "/init/../health", "/init%0d%0a", "/logs", "//logs", "/%6cogs", "/loopback?port=80", "//loopback", "/copy?dest=/", "/%63opy", "/accounts", "/freeze", "/fsfreeze",
		"/fsthaw", "/unfreeze", "/collapse", "/upgrade", "/sandbox/" + string(testID) + "/49983/init", "/sandbox/" + string(testID) + "/49983//init",
		"http://localhost/init", "http://x:y@localhost//init", "http://49983-" + string(testID) + ".t/init", "http://localhost/sandbox/" + string(testID) + "/49983/init",
	}
	for _, method := range []string{"GET", "POST", "HEAD", "PUT", "OPTIONS", "post", "PATCH", "X"} {
		for _, target := range targets {
			conn := r.dialRaw(t)
			_, _ = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: %s\r\nX-Http-Method-Override: POST\r\nX-Original-Url: /init\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", method, target, testID)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("%s %s: %v", method, target, err)
			}
			_ = res.Body.Close()
			_ = conn.Close()
			if reached.Swap(false) {
				t.Errorf("%s %s reached an internal route", method, target)
			}
			if res.StatusCode != http.StatusNotFound && res.StatusCode != http.StatusBadRequest {
				t.Errorf("%s %s: status %d", method, target, res.StatusCode)
			}
		}
	}
	t.Run("h2c", func(t *testing.T) {
		req := r.request(t, http.MethodPost, "/init", nil, headerSandboxID, string(testID))
		if res, _ := do(t, h2cClient(t), req); res.StatusCode != http.StatusNotFound || reached.Load() {
			t.Errorf("status %d, reached %v", res.StatusCode, reached.Load())
		}
	})
	t.Run("other ports", func(t *testing.T) {
		r.listen(t, testID, 8000, seen("8000"))
		if res, _ := r.get(t, "/init", toGuest("8000")...); res.StatusCode != http.StatusOK {
			t.Errorf("a user's own /init: status %d", res.StatusCode)
		}
	})
	t.Run("public routes", func(t *testing.T) {
		for _, path := range []string{"/health", "/files?path=/init", "/files/compose", "/envs", "/metrics", "/process.Process/Start", "/filesystem.Filesystem/ListDir"} {
			req := r.request(t, http.MethodGet, path, nil, headerSandboxID, string(testID))
			if internalRoute(req.URL.EscapedPath()) {
				t.Errorf("%s is refused", path)
			}
		}
	})
}
