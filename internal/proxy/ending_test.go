package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// sent is an answer, or why there is none.
type sent struct {
	status int
	body   string
	close  bool
	err    error
}

// send sends a request and reports, later, what came of it.
func send(c *http.Client, req *http.Request) <-chan sent {
	out := make(chan sent, 1)
	go func() {
		res, err := c.Do(req)
		if err != nil {
			out <- sent{err: err}
			return
		}
		defer func() { _ = res.Body.Close() }()
		body, err := io.ReadAll(res.Body)
		out <- sent{res.StatusCode, string(body), res.Close, err}
	}()
	return out
}

// silent is a guest that takes requests and answers none until its client leaves.
func silent(entered chan<- struct{}) http.Handler {
	return http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		entered <- struct{}{}
		buf := make([]byte, 1024)
		for { // to see the end of an upload that stalls
			if _, err := q.Body.Read(buf); err != nil {
				break
			}
		}
		<-q.Context().Done()
	})
}

func TestSandboxEndsBeforeAnswer(t *testing.T) {
	const reason = "out of memory: limit 512 MiB"
	want := wireFailure{string(testID), "The sandbox ended while the request was open: " + reason, 0, 502}
	for _, name := range []string{"h1", "h2c"} {
		for _, upload := range []string{"none", "complete", "stalled"} {
			t.Run(name+" upload "+upload, func(t *testing.T) {
				r := newRig(t, nil)
				entered := make(chan struct{}, 1)
				r.listen(t, testID, 8000, silent(entered))
				c := client(t)
				if name == "h2c" {
					c = h2cClient(t)
				}
				var body io.Reader
				switch upload {
				case "complete":
					body = strings.NewReader("hello")
				case "stalled":
					pr, pw := io.Pipe()
					defer func() { _ = pw.Close() }()
					go func() { _, _ = io.WriteString(pw, "hel") }()
					body = pr
				}
				out := send(c, r.request(t, http.MethodPost, "/", body, toGuest("8000")...))
				<-entered
				r.end(testID, sandbox.StateFailed, reason)
				got := <-out
				if got.err != nil || got.status != http.StatusBadGateway {
					t.Fatalf("%+v", got)
				}
				if diff := cmp.Diff(want, failureOf(t, got.body)); diff != "" {
					t.Error(diff)
				}
				if upload == "stalled" && name == "h1" && !got.close {
					t.Error("the connection stays open with half an upload in it")
				}
			})
		}
	}
}

// TestReasonArrivesLate closes the connections first and tells the router why afterwards.
func TestReasonArrivesLate(t *testing.T) {
	r := newRig(t, nil)
	entered := make(chan struct{}, 1)
	r.listen(t, testID, 8000, silent(entered))
	out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	<-entered
	r.mu.Lock()
	conns := r.conns[testID]
	asked := make(chan struct{})
	r.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
	go func() {
		defer close(asked)
		r.set(testID, sandbox.Route{State: sandbox.StateFailed, Reason: "killed by signal 9"})
	}()
	<-asked
	if f := failureOf(t, (<-out).body); !strings.HasSuffix(f.Message, "killed by signal 9") || f.Code != 502 {
		t.Errorf("%+v", f)
	}
}

// TestSandboxEndsBeforeDial has the node know of the end before the router does.
func TestSandboxEndsBeforeDial(t *testing.T) {
	r := newRig(t, nil)
	r.dialErr = sandbox.NotFoundf("sandbox is not here")
	r.onDial = func() {
		r.set(testID, sandbox.Route{State: sandbox.StateFailed, Reason: "out of memory: limit 512 MiB"})
	}
	_, body := r.get(t, "/", toGuest("8000")...)
	want := wireFailure{string(testID), "The sandbox failed: out of memory: limit 512 MiB", 0, http.StatusBadGateway}
	if diff := cmp.Diff(want, failureOf(t, body)); diff != "" {
		t.Error(diff)
	}
}

func TestCloseCutsUpgradedConnections(t *testing.T) {
	r := newRig(t, nil)
	r.raw(t, 8000, func(c net.Conn) {
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello")
		_, _ = io.Copy(io.Discard, c)
	})
	conn := r.dialRaw(t)
	_, _ = fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: 8000\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", testID)
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v %v", res, err)
	}
	_ = res.Body.Close()
	if got, err := br.Peek(5); err != nil || string(got) != "hello" {
		t.Fatalf("%q %v", got, err)
	}
	r.proxy.Close()
	if _, err := io.ReadAll(br); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

func TestDrop(t *testing.T) {
	r := newRig(t, nil)
	entered := make(chan struct{}, 1)
	r.listen(t, testID, 8000, silent(entered))
	pr, pw := io.Pipe()
	defer func() { _ = pw.Close() }()
	out := send(client(t), r.request(t, http.MethodPost, "/", pr, toGuest("8000")...))
	_, _ = io.WriteString(pw, "x")
	<-entered
	r.set(testID, sandbox.Route{State: sandbox.StateDeleted, Reason: "timeout"})
	r.proxy.Drop(testID)
	r.proxy.Drop("unknown")
	if got := <-out; got.status != 502 || !strings.HasSuffix(failureOf(t, got.body).Message, ": timeout") {
		t.Errorf("%+v", got)
	}
}

func TestSandboxEndsDuringAnswer(t *testing.T) {
	heads := map[string]string{
		"chunked":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"known length":  "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello",
		"until the end": "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
		"HTTP/1.0":      "HTTP/1.0 200 OK\r\n\r\nhello",
	}
	for head, answer := range heads {
		for _, orderly := range []bool{false, true} {
			for _, name := range []string{"h1", "h2c"} {
				t.Run(fmt.Sprint(head, " ", name, " orderly ", orderly), func(t *testing.T) {
					r := newRig(t, nil)
					stop := make(chan struct{})
					r.raw(t, 8000, func(c net.Conn) {
						_, _ = io.WriteString(c, answer)
						<-stop
					})
					c := client(t)
					if name == "h2c" {
						c = h2cClient(t)
					}
					res, err := c.Do(r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
					if err != nil {
						t.Fatal(err)
					}
					defer func() { _ = res.Body.Close() }()
					if _, err := io.ReadFull(res.Body, make([]byte, 5)); err != nil {
						t.Fatal(err)
					}
					if orderly { // the guest's own kernel closes the connection as it goes down
						r.set(testID, sandbox.Route{State: sandbox.StateDeleted})
						close(stop)
					} else {
						defer close(stop)
						r.end(testID, sandbox.StateDeleted, "")
					}
					if rest, err := io.ReadAll(res.Body); err == nil {
						t.Errorf("the answer ended as if complete, after %q", rest)
					}
				})
			}
		}
	}
}

func TestClientLeaves(t *testing.T) {
	for _, name := range []string{"h1", "h2c"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			entered, left := make(chan struct{}), make(chan struct{})
			r.listen(t, testID, 8000, http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
				close(entered)
				<-q.Context().Done()
				close(left)
			}))
			c := client(t)
			if name == "h2c" {
				c = h2cClient(t)
			}
			ctx, cancel := context.WithCancel(t.Context())
			out := send(c, r.request(t, http.MethodGet, "/", nil, toGuest("8000")...).WithContext(ctx))
			<-entered
			cancel()
			<-left
			if got := <-out; !errors.Is(got.err, context.Canceled) {
				t.Errorf("%+v", got)
			}
		})
	}
}

// raw lets serve answer, byte by byte, on a port of the test's sandbox. Each connection's request head is read first.
func (r *rig) raw(t *testing.T, port uint16, serve func(net.Conn)) {
	t.Helper()
	ln := listen(t)
	done := make(chan struct{})
	t.Cleanup(func() {
		_ = ln.Close()
		<-done
	})
	r.point(testID, port, ln.Addr().String())
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					serve(c)
				}
			}()
		}
	}()
}

func TestBrokenGuests(t *testing.T) {
	tests := map[string]string{
		"closes at once":     "",
		"speaks SSH":         "SSH-2.0-OpenSSH_9.2\r\n",
		"stops in its head":  "HTTP/1.1 200 OK\r\nContent-",
		"endless head":       "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxGuestHeaderBytes+1),
		"two lengths":        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"switches unasked":   "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"endless interim":    strings.Repeat("HTTP/1.1 103 Early Hints\r\nX: "+strings.Repeat("x", 1000)+"\r\n\r\n", 2000),
		"unknown coding":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
		"header with a NUL":  "HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
		"header without key": "HTTP/1.1 200 OK\r\n: x\r\n\r\n",
	}
	for name, answer := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			r.raw(t, 8000, func(c net.Conn) { _, _ = io.WriteString(c, answer) })
			res, body := r.get(t, "/", toGuest("8000")...)
			if f := failureOf(t, body); res.StatusCode != http.StatusBadGateway || f.SandboxID != string(testID) || !strings.HasPrefix(f.Message, "The server inside the sandbox") {
				t.Errorf("%d %+v", res.StatusCode, f)
			}
		})
	}
}

// TestGuestDiesDuringStalledUpload has the server in the guest go away, not the sandbox.
func TestGuestDiesDuringStalledUpload(t *testing.T) {
	r := newRig(t, nil)
	r.raw(t, 8000, func(net.Conn) {})
	pr, pw := io.Pipe()
	defer func() { _ = pw.Close() }()
	out := send(client(t), r.request(t, http.MethodPost, "/", pr, toGuest("8000")...))
	_, _ = io.WriteString(pw, "x")
	if got := <-out; got.status != 502 || !strings.HasPrefix(failureOf(t, got.body).Message, "The server inside") {
		t.Errorf("%+v", got)
	}
}

func TestAnswerBeforeUploadEnds(t *testing.T) {
	for _, name := range []string{"h1", "h2c"} {
		for _, answer := range []string{
			"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\n\r\nfull",
			"HTTP/1.1 413 Too Large\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfull\r\n0\r\n\r\n",
		} {
			t.Run(name, func(t *testing.T) {
				r := newRig(t, nil)
				r.raw(t, 8000, func(c net.Conn) { _, _ = io.WriteString(c, answer) })
				c := client(t)
				if name == "h2c" {
					c = h2cClient(t)
				}
				pr, pw := io.Pipe()
				defer func() { _ = pw.Close() }()
				out := send(c, r.request(t, http.MethodPost, "/", pr, toGuest("8000")...))
				_, _ = io.WriteString(pw, "x")
				got := <-out
				if got.err != nil || got.status != 413 || got.body != "full" {
					t.Errorf("%+v", got)
				}
				if name == "h1" && !got.close {
					t.Error("the connection stays open with half an upload in it")
				}
			})
		}
	}
}

// TestRestOfUploadIsNoRequest hides a request in the part of an upload that nobody reads.
func TestRestOfUploadIsNoRequest(t *testing.T) {
	r := newRig(t, nil)
	r.raw(t, 8000, func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n") })
	var hidden atomic.Bool
	r.listen(t, testID, 8001, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hidden.Store(true) }))
	conn := r.dialRaw(t)
	head := "POST / HTTP/1.1\r\nHost: " + r.addr + "\r\nE2b-Sandbox-Id: " + string(testID) + "\r\n"
	_, _ = io.WriteString(conn, head+"E2b-Sandbox-Port: 8000\r\nContent-Length: 100000\r\n\r\n")
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != http.StatusUnauthorized {
		t.Fatalf("%v %v", res, err)
	}
	_ = res.Body.Close()
	_, _ = io.WriteString(conn, head+"E2b-Sandbox-Port: 8001\r\nContent-Length: 0\r\n\r\n")
	if _, err := br.Peek(1); err == nil || hidden.Load() {
		t.Errorf("the rest of an upload was taken for a request: hidden %v", hidden.Load())
	}
}

// TestStalePooledConnection has a guest close the connection that it kept open when the next request arrives on it.
func TestStalePooledConnection(t *testing.T) {
	tests := []struct {
		method string
		key    string
		want   int
	}{
		{http.MethodGet, "", 200}, {http.MethodPost, "", 502}, {http.MethodPut, "", 502}, {http.MethodPost, "once", 200},
	}
	for _, tt := range tests {
		t.Run(tt.method+tt.key, func(t *testing.T) {
			r := newRig(t, nil)
			ln := listen(t)
			defer func() { _ = ln.Close() }()
			r.point(testID, 8000, ln.Addr().String())
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					br := bufio.NewReader(c)
					if q, err := http.ReadRequest(br); err == nil {
						_, _ = io.Copy(io.Discard, q.Body)
						_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
						_, _ = http.ReadRequest(br) // the second request is met with silence
					}
					_ = c.Close()
				}
			}()
			c := client(t)
			do(t, c, r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
			req := r.request(t, tt.method, "/", nil, toGuest("8000")...) // a GET, or a POST that may be repeated
			if tt.method != http.MethodGet && tt.key == "" {
				req = r.request(t, tt.method, "/", strings.NewReader("body"), toGuest("8000")...)
			}
			if tt.key != "" {
				req.Header.Set("Idempotency-Key", tt.key)
			}
			if res, body := do(t, c, req); res.StatusCode != tt.want {
				t.Errorf("%d %s, want %d", res.StatusCode, body, tt.want)
			}
		})
	}
}

func TestUploadCanBeSentAgainOnlyWhole(t *testing.T) {
	m, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	u := &upload{body: strings.NewReader("hello"), metrics: m}
	if _, err := u.again(); err != nil {
		t.Errorf("before the first byte: %v", err)
	}
	if got, _ := io.ReadAll(u); string(got) != "hello" || !u.complete.Load() {
		t.Errorf("%q, complete %v", got, u.complete.Load())
	}
	if _, err := u.again(); err == nil {
		t.Error("half an upload may be sent again")
	}
}

func TestShutdown(t *testing.T) {
	r := newRig(t, func(c *Config) { c.DrainTimeout = time.Millisecond })
	entered, streaming := make(chan struct{}, 1), make(chan struct{})
	r.listen(t, testID, 8000, silent(entered))
	r.listen(t, testID, 8001, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_ = http.NewResponseController(w).Flush()
		close(streaming)
		<-q.Context().Done()
	}))
	waiting := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	stream := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8001")...))
	<-entered
	<-streaming
	if err := r.stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if got := <-stream; got.err == nil {
		t.Errorf("the stream ended as if complete: %+v", got)
	}
	if got := <-waiting; got.status != http.StatusServiceUnavailable {
		t.Errorf("the open request: %+v", got)
	}
	if _, fail := r.proxy.forwarder.guests.join(destination{target: target{id: testID}}, &exchange{}); fail == nil || fail.cause != causeShutdown {
		t.Errorf("a request after the end: %+v", fail)
	}
}

func TestShutdownLetsRequestsEnd(t *testing.T) {
	r := newRig(t, func(c *Config) { c.DrainTimeout = time.Minute })
	entered, leave := make(chan struct{}), make(chan struct{})
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(entered)
		<-leave
		_, _ = io.WriteString(w, "done")
	}))
	out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	<-entered
	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	for { // until the listener is closed
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", r.addr)
		if err != nil {
			break
		}
		_ = c.Close()
	}
	close(leave)
	if got := <-out; got.body != "done" {
		t.Errorf("%+v", got)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestServeReportsABrokenListener(t *testing.T) {
	w := newWorld()
	p, err := New(Config{Router: w, Dialer: w})
	if err != nil {
		t.Fatal(err)
	}
	ln := listen(t)
	_ = ln.Close()
	if err := p.Serve(t.Context(), ln, ServeOptions{}); err == nil || !strings.Contains(err.Error(), ln.Addr().String()) {
		t.Errorf("error %v, want one with the address", err)
	}
}
