package proxy

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// onlyFast ends a test where net/http carries HTTP/1.1.
func onlyFast(t *testing.T) bool {
	t.Helper()
	return dataPath == HTTP1Fast
}

// toPort are the lines that bring a raw request to a port of the test's sandbox.
func toPort(port int) string {
	return fmt.Sprintf("Host: localhost\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: %d\r\n", testID, port)
}

// said is the head of an answer whose body has been read.
type said struct {
	status  int
	header  http.Header
	length  int64
	codings []string
}

// say sends bytes and reads one answer.
func say(t *testing.T, conn net.Conn, br *bufio.Reader, method, bytes string) (said, string) {
	t.Helper()
	if _, err := io.WriteString(conn, bytes); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return said{res.StatusCode, res.Header, res.ContentLength, res.TransferEncoding}, string(body)
}

func TestHTTP10(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/stream" {
			_ = http.NewResponseController(w).Flush()
		}
		_, _ = io.WriteString(w, "hello")
	}))
	conn := r.dialRaw(t)
	br := bufio.NewReader(conn)
	for range 2 {
		res, body := say(t, conn, br, "GET", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n"+toPort(8000)+"\r\n")
		if body != "hello" || res.length != 5 || !strings.EqualFold(res.header.Get("Connection"), "keep-alive") {
			t.Errorf("%q, %v", body, res.header)
		}
	}
	res, body := say(t, conn, br, "GET", "GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n"+toPort(8000)+"\r\n")
	if body != "hello" || len(res.codings) > 0 || res.length != -1 {
		t.Errorf("a stream: %q, %v %d", body, res.codings, res.length)
	}
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("after a stream: %v, want the end of the connection", err)
	}
}

// TestBodylessAnswers keeps one connection through answers that must not have a body, whatever their head says.
func TestBodylessAnswers(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		switch q.URL.Path {
		case "/204":
			w.WriteHeader(http.StatusNoContent)
		case "/304":
			w.Header().Set("Etag", `"x"`)
			w.WriteHeader(http.StatusNotModified)
		default:
			w.Header().Set("Content-Length", "5")
			_, _ = io.WriteString(w, "hello")
		}
	}))
	conn := r.dialRaw(t)
	br := bufio.NewReader(conn)
	for _, ask := range []string{"HEAD /", "GET /204", "GET /304", "GET /", "HEAD /nothing"} {
		method, _, _ := strings.Cut(ask, " ")
		res, body := say(t, conn, br, method, ask+" HTTP/1.1\r\n"+toPort(8000)+"\r\n")
		if want := map[bool]string{true: "hello"}[ask == "GET /"]; body != want {
			t.Errorf("%s: %d %q", ask, res.status, body)
		}
		if method == http.MethodHead && res.length != 5 {
			t.Errorf("%s: length %d, want 5", ask, res.length)
		}
		if res.header.Get("Date") == "" {
			t.Errorf("%s: no Date", ask)
		}
	}
}

// TestExpectationThatTheGuestIgnores has a client wait for a permission that its guest never gives.
func TestExpectationThatTheGuestIgnores(t *testing.T) {
	r := newRig(t, nil)
	got := make(chan string, 1)
	ln := listen(t)
	defer func() { _ = ln.Close() }()
	r.point(testID, 8000, ln.Addr().String())
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		br := bufio.NewReader(c)
		for line := "x"; strings.TrimSpace(line) != ""; {
			line, _ = br.ReadString('\n')
		}
		body := make([]byte, 5)
		_, _ = io.ReadFull(br, body)
		got <- string(body)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	}()
	conn := r.dialRaw(t)
	br := bufio.NewReader(conn)
	_, _ = io.WriteString(conn, "POST / HTTP/1.1\r\n"+toPort(8000)+"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
	line, err := br.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "HTTP/1.1 100 ") {
		t.Fatalf("%q %v", line, err)
	}
	_, _ = br.ReadString('\n')
	if _, body := say(t, conn, br, "POST", "hello"); body != "ok" || <-got != "hello" {
		t.Errorf("%q", body)
	}
}

// TestPipelining sends requests without waiting for answers.
func TestPipelining(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		_, _ = fmt.Fprintf(w, "%s %s", q.URL.Path, body)
	}))
	conn := r.dialRaw(t)
	go func() {
		for i := range 50 {
			_, _ = fmt.Fprintf(conn, "POST /%d HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", i, toPort(8000))
		}
	}()
	br := bufio.NewReader(conn)
	for i := range 50 {
		if _, body := say(t, conn, br, "POST", ""); body != fmt.Sprintf("/%d abc", i) {
			t.Fatalf("answer %d: %q", i, body)
		}
	}
}

// TestForeignHost asks over one connection for a sandbox, then for something else, then for a sandbox again.
func TestForeignHost(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprint("tls ", secure), func(t *testing.T) {
			w := newWorld()
			w.set(testID, sandbox.Route{State: sandbox.StateRunning})
			w.listen(t, testID, 8000, http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
				_, _ = io.WriteString(rw, "guest "+q.Header.Get("X-Forwarded-Proto"))
			}))
			p, err := New(Config{Router: w, Dialer: w, HTTP1: dataPath, DrainTimeout: time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			opt := ServeOptions{
				Foreign: func(host string) bool { return host == "api.test" },
				Handler: http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
					if q.Host != "api.test" {
						p.ServeHTTP(rw, q)
						return
					}
					body, _ := io.ReadAll(q.Body)
					_, _ = fmt.Fprintf(rw, "api %s %v", body, q.TLS != nil)
				}),
			}
			ln := listen(t)
			var conn net.Conn
			if secure {
				cert, pool := testCertificate(t)
				opt.TLS = cert.TLSConfig()
				conn = tlsClient(t, ln, pool, serveUntilEnd(t, p, ln, opt))
			} else {
				serveUntilEnd(t, p, ln, opt)()
				conn, err = net.Dial("tcp", ln.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
			}
			defer func() { _ = conn.Close() }()
			br := bufio.NewReader(conn)
			proto := map[bool]string{false: "http", true: "https"}[secure]
			for _, ask := range []struct{ bytes, want string }{
				{"GET / HTTP/1.1\r\n" + toPort(8000) + "\r\n", "guest " + proto},
				{"POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 4\r\n\r\nbody", fmt.Sprint("api body ", secure)},
				{"GET / HTTP/1.1\r\n" + toPort(8000) + "\r\n", "guest " + proto},
			} {
				if _, body := say(t, conn, br, "GET", ask.bytes); body != ask.want {
					t.Errorf("%q, want %q", body, ask.want)
				}
			}
		})
	}
}

func testCertificate(t *testing.T) (*Certificate, *tls.Config) {
	t.Helper()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writeCertificate(t, certFile, keyFile, "sbx.test")
	cert, err := LoadCertificate(certFile, keyFile, nil)
	if err != nil {
		t.Fatal(err)
	}
	return cert, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}
}

func tlsClient(t *testing.T, ln net.Listener, config *tls.Config, start func()) net.Conn {
	t.Helper()
	start()
	conn, err := tls.Dial("tcp", ln.Addr().String(), config)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// serveUntilEnd prepares a proxy that serves until the test ends.
func serveUntilEnd(t *testing.T, p *Proxy, ln net.Listener, opt ServeOptions) func() {
	t.Helper()
	return func() {
		ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
		done := make(chan error, 1)
		go func() { done <- p.Serve(ctx, ln, opt) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

// TestLargeBodiesOverTLS moves bodies that the kernel cannot move by itself.
func TestLargeBodiesOverTLS(t *testing.T) {
	w := newWorld()
	w.set(testID, sandbox.Route{State: sandbox.StateRunning})
	w.listen(t, testID, 8000, http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		rw.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = rw.Write(body)
	}))
	p, err := New(Config{Router: w, Dialer: w, HTTP1: dataPath, DrainTimeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	cert, config := testCertificate(t)
	ln := listen(t)
	serveUntilEnd(t, p, ln, ServeOptions{TLS: cert.TLSConfig()})()
	tr := &http.Transport{TLSClientConfig: config}
	defer tr.CloseIdleConnections()
	blob := make([]byte, 3<<20+5)
	_, _ = rand.Read(blob)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+ln.Addr().String(), strings.NewReader(string(blob)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(headerSandboxID, string(testID))
	req.Header.Set(headerSandboxPort, "8000")
	_, body := do(t, &http.Client{Transport: tr}, req)
	if sha256.Sum256([]byte(body)) != sha256.Sum256(blob) {
		t.Errorf("%d bytes came back, want the %d that were sent", len(body), len(blob))
	}
}

// TestShortBody has a guest promise more than it sends, more than a buffer of it.
func TestShortBody(t *testing.T) {
	for _, n := range []int{10, 200 << 10} {
		r := newRig(t, nil)
		r.raw(t, 8000, func(c net.Conn) {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", 1<<20, strings.Repeat("x", n))
		})
		res, err := client(t).Do(r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if !errors.Is(err, io.ErrUnexpectedEOF) || got != int64(n) {
			t.Errorf("%d bytes and %v, want %d and an unexpected end", got, err, n)
		}
	}
}

// TestSilentHead has a client begin a head and not end it.
func TestSilentHead(t *testing.T) {
	if !onlyFast(t) {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := &clientConn{server: &fastServer{}, conn: far, buf: make([]byte, clientBuffer)}
		over := make(chan error, 1)
		begin := time.Now()
		go func() {
			_, err := c.readHead(true)
			over <- err
		}()
		_, _ = io.WriteString(near, "GET / HTTP/1.1\r\nHost: ")
		if err := <-over; err == nil || time.Since(begin) != readHeaderTimeout {
			t.Errorf("%v after %v, want an end after %v", err, time.Since(begin), readHeaderTimeout)
		}
		_ = near.Close()
	})
}

// TestIdleClient has a client connect and say nothing.
func TestIdleClient(t *testing.T) {
	if !onlyFast(t) {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer func() { _ = near.Close() }()
		c := &clientConn{server: &fastServer{}, conn: far, buf: make([]byte, clientBuffer)}
		begin := time.Now()
		if _, err := c.readHead(true); err == nil || time.Since(begin) != idleTimeout {
			t.Errorf("%v after %v, want an end after %v", err, time.Since(begin), idleTimeout)
		}
	})
}

// TestStalledClient has a client ask for more than it reads.
func TestStalledClient(t *testing.T) {
	if !onlyFast(t) {
		return
	}
	r := newRig(t, nil)
	p, err := New(Config{Router: r.world, Dialer: r.world, DrainTimeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	r.raw(t, 8000, func(c net.Conn) {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
		piece := make([]byte, 64<<10)
		for {
			if _, err := c.Write(piece); err != nil {
				ended <- err
				return
			}
		}
	})
	p.stallTimeout = 300 * time.Millisecond
	ln := listen(t)
	serveUntilEnd(t, p, ln, ServeOptions{})()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\n"+toPort(8000)+"\r\n")
	<-ended // or the test runs into its own timeout
}

// TestShutdownClosesIdleConnections has a client keep its connection when the proxy ends.
func TestShutdownClosesIdleConnections(t *testing.T) {
	r := newRig(t, func(c *Config) { c.DrainTimeout = time.Minute })
	r.listen(t, testID, 8000, seen("8000"))
	conn := r.dialRaw(t)
	br := bufio.NewReader(conn)
	say(t, conn, br, "GET", "GET / HTTP/1.1\r\n"+toPort(8000)+"\r\n")
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if _, err := br.ReadByte(); err == nil {
		t.Error("the connection is still open")
	}
}

// pipes dials connections that are not TCP, as those over another machine's link.
type pipes struct {
	*world
	conns atomic.Int64
}

func (p *pipes) DialGuest(ctx context.Context, node sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error) {
	c, err := p.world.DialGuest(ctx, node, id, port)
	if err != nil {
		return nil, err
	}
	p.conns.Add(1)
	return struct{ net.Conn }{c}, nil
}

// TestOtherConnections goes over connections of which only a Read tells whether they are still open.
func TestOtherConnections(t *testing.T) {
	var p *pipes
	r := newRig(t, func(c *Config) {
		p = &pipes{world: c.Router.(*world)} //nolint:errcheck,forcetypeassert // made by newRig
		c.Dialer = p
	})
	guest := r.listen(t, testID, 8000, seen("8000"))
	c := client(t)
	for range 5 {
		do(t, c, r.request(t, http.MethodPost, "/", strings.NewReader("x"), toGuest("8000")...))
	}
	if n := p.conns.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	if !onlyFast(t) {
		return
	}
	g := r.proxy.forwarder.guests
	g.mu.Lock()
	kept := g.byID[testID].pool.idle[8000][0]
	g.mu.Unlock()
	guest.CloseClientConnections()
	<-kept.over
	for range 2 {
		if res, body := do(t, c, r.request(t, http.MethodPost, "/", strings.NewReader("x"), toGuest("8000")...)); res.StatusCode != http.StatusOK {
			t.Errorf("after the guest closed it: %d %s", res.StatusCode, body)
		}
	}
}

// TestPoolForgets fills a pool and lets time pass.
func TestPoolForgets(t *testing.T) {
	if !onlyFast(t) {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		p := newPool()
		var far []net.Conn
		var nearest net.Conn // the last one that there was room for
		for i := range maxIdlePerPort + 1 {
			near, other := net.Pipe()
			far = append(far, other)
			if i < maxIdlePerPort {
				nearest = near
			}
			p.put(80, newBackend(near))
		}
		if p.total != maxIdlePerPort {
			t.Errorf("%d connections are kept, want %d", p.total, maxIdlePerPort)
		}
		last := p.get(80)
		if last == nil || last.Conn != nearest {
			t.Fatalf("got %v, want the connection that was used last", last)
		}
		time.Sleep(2 * idleConnTimeout) //nolint:forbidigo // in a bubble
		if p.get(80) != nil {
			t.Error("a connection is kept for ever")
		}
		p.close()
		p.put(80, last)
		for _, c := range far {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("a connection is still open")
			}
		}
	})
}

// TestUploadWhileDialling has a client send its body while its guest is still being connected to, and be watched meanwhile.
func TestUploadWhileDialling(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		all, _ := io.ReadAll(q.Body)
		_, _ = w.Write(all)
	}))
	conn := r.dialRaw(t)
	body := strings.Repeat("0123456789", 1000)
	r.onDial = func() {
		<-time.After(3 * watchAfter) // somebody looks whether the client is there
		_, _ = io.WriteString(conn, body[:1])
		<-time.After(watchAfter)
		go func() { _, _ = io.WriteString(conn, body[1:]) }()
	}
	head := fmt.Sprintf("POST / HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n", toPort(8000), len(body))
	if _, got := say(t, conn, bufio.NewReader(conn), "POST", head); got != body {
		t.Errorf("%d bytes came back, want the %d that were sent", len(got), len(body))
	}
}

// TestClientLeavesAfterUpload has a client send a whole body and not wait for the answer.
func TestClientLeavesAfterUpload(t *testing.T) {
	for _, length := range []int{5, 100_000} {
		r := newRig(t, nil)
		entered, left := make(chan struct{}), make(chan struct{})
		r.listen(t, testID, 8000, http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
			_, _ = io.Copy(io.Discard, q.Body)
			close(entered)
			<-q.Context().Done()
			close(left)
		}))
		conn := r.dialRaw(t)
		_, _ = fmt.Fprintf(conn, "POST / HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s", toPort(8000), length, strings.Repeat("x", length))
		<-entered
		_ = conn.Close()
		<-left
	}
}

// TestNextRequestWhileWaiting has a client send its next request while the answer to the first is awaited.
func TestNextRequestWhileWaiting(t *testing.T) {
	r := newRig(t, nil)
	next := make(chan struct{}, 1)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/first" {
			next <- struct{}{}
			<-time.After(3 * watchAfter)
		}
		_, _ = io.WriteString(w, q.URL.Path)
	}))
	conn := r.dialRaw(t)
	go func() {
		<-next
		<-time.After(2 * watchAfter)
		_, _ = io.WriteString(conn, "GET /second HTTP/1.1\r\n"+toPort(8000)+"\r\n")
	}()
	br := bufio.NewReader(conn)
	if _, got := say(t, conn, br, "GET", "GET /first HTTP/1.1\r\n"+toPort(8000)+"\r\n"); got != "/first" {
		t.Error(got)
	}
	if _, got := say(t, conn, br, "GET", ""); got != "/second" {
		t.Error(got)
	}
}
