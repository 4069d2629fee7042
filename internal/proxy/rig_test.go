package proxy

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) {
	flag.Parse()
	goleak.VerifyTestMain(bothPaths{m})
}

// dataPath is the data path that rigs take.
var dataPath = HTTP1Fast

// bothPaths runs all tests once for each data path.
type bothPaths struct{ m *testing.M }

func (b bothPaths) Run() int {
	if f := flag.Lookup("test.fuzz"); f != nil && f.Value.String() != "" {
		return b.m.Run()
	}
	for _, dataPath = range []string{HTTP1Standard, HTTP1Fast} {
		if code := b.m.Run(); code != 0 {
			_, _ = fmt.Fprintln(os.Stderr, "HTTP/1.1 was", dataPath)
			return code
		}
	}
	return 0
}

const testID = sandbox.ID("i0node0abcdefghijklm")

// world is a router, a dialer and a finder of signatures over servers of this process.
type world struct {
	mu     sync.Mutex
	routes map[sandbox.ID]sandbox.Route
	addrs  map[string]string // id:port -> address
	conns  map[sandbox.ID][]net.Conn
	signed map[signedURL]sandbox.ID

	news chan struct{} // closed by the next change of a route

	routeErr, dialErr error
	onDial            func()
	onWake            func(context.Context, sandbox.ID) (sandbox.Route, error)
	dials, wakes      atomic.Int64
}

func newWorld() *world {
	return &world{
		routes: map[sandbox.ID]sandbox.Route{}, addrs: map[string]string{}, conns: map[sandbox.ID][]net.Conn{}, signed: map[signedURL]sandbox.ID{},
		news: make(chan struct{}),
	}
}

func (w *world) Route(_ context.Context, id sandbox.ID) (sandbox.Route, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.routeErr != nil {
		return sandbox.Route{}, w.routeErr
	}
	r, ok := w.routes[id]
	if !ok {
		return sandbox.Route{}, sandbox.NotFoundf("sandbox %s", id)
	}
	return r, nil
}

func (w *world) Await(ctx context.Context, id sandbox.ID, seen sandbox.Route) (sandbox.Route, error) {
	for {
		w.mu.Lock()
		news := w.news
		w.mu.Unlock()
		r, err := w.Route(ctx, id)
		if err != nil || r.News(seen) {
			return r, err
		}
		select {
		case <-news:
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
}

func (w *world) Wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	w.wakes.Add(1)
	if w.onWake == nil {
		return sandbox.Route{}, sandbox.Conflictf("sandbox %s is paused", id)
	}
	return w.onWake(ctx, id)
}

func (w *world) DialGuest(ctx context.Context, _ sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error) {
	w.dials.Add(1)
	w.mu.Lock()
	addr, ok := w.addrs[fmt.Sprintf("%s:%d", id, port)]
	err, onDial := w.dialErr, w.onDial
	w.mu.Unlock()
	if onDial != nil {
		onDial()
	}
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("port %d of sandbox %s: %w: %w", port, id, sandbox.ErrUnavailable, syscall.ECONNREFUSED)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[id] = append(w.conns[id], conn)
	return conn, nil
}

func (w *world) SandboxBySignature(_ context.Context, path, op, user, signature, expiration string) (sandbox.ID, error) { //nolint:revive // as in the interface
	w.mu.Lock()
	defer w.mu.Unlock()
	id, ok := w.signed[signedURL{path, op, user, signature, expiration}]
	if !ok {
		return "", sandbox.NotFoundf("no sandbox made signature %q", signature)
	}
	return id, nil
}

func (w *world) set(id sandbox.ID, r sandbox.Route) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.putLocked(id, r)
}

func (w *world) putLocked(id sandbox.ID, r sandbox.Route) {
	r.ID = id
	w.routes[id] = r
	close(w.news)
	w.news = make(chan struct{})
}

// listen lets handler answer on a port of a sandbox.
func (w *world) listen(tb testing.TB, id sandbox.ID, port uint16, handler http.Handler) *httptest.Server {
	tb.Helper()
	return w.listenWith(tb, id, port, handler, nil)
}

// listenWith tells the server's connections' states, too.
func (w *world) listenWith(tb testing.TB, id sandbox.ID, port uint16, handler http.Handler, state func(net.Conn, http.ConnState)) *httptest.Server {
	tb.Helper()
	srv := httptest.NewUnstartedServer(handler)
	if state != nil {
		srv.Config.ConnState = state
	}
	srv.Start()
	tb.Cleanup(srv.Close)
	w.point(id, port, srv.Listener.Addr().String())
	return srv
}

func (w *world) point(id sandbox.ID, port uint16, addr string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.addrs[fmt.Sprintf("%s:%d", id, port)] = addr
}

// end closes a sandbox's connections, as its node does, and tells the router with or after it.
func (w *world) end(id sandbox.ID, state sandbox.State, reason string) {
	w.mu.Lock()
	conns := w.conns[id]
	w.putLocked(id, sandbox.Route{State: state, Reason: reason})
	w.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// rig is a running proxy.
type rig struct {
	*world
	proxy   *Proxy
	addr    string
	metrics *prometheus.Registry
	stop    func() error
}

func newRig(tb testing.TB, change func(*Config)) *rig {
	tb.Helper()
	w := newWorld()
	w.set(testID, sandbox.Route{State: sandbox.StateRunning, Generation: 1})
	r := &rig{world: w, metrics: prometheus.NewRegistry()}
	cfg := Config{HTTP1: dataPath, Logger: slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})), Router: w, Dialer: w, Signatures: w, Registerer: r.metrics, DrainTimeout: 50 * time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.proxy, err = New(cfg); err != nil {
		tb.Fatal(err)
	}
	ln := listen(tb)
	r.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(tb.Context())
	done := make(chan error, 1)
	go func() { done <- r.proxy.Serve(ctx, ln, ServeOptions{}) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	tb.Cleanup(func() {
		if err := r.stop(); err != nil {
			tb.Errorf("Run: %v", err)
		}
	})
	return r
}

func listen(tb testing.TB) net.Listener {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	return ln
}

// client returns an HTTP client of its own, without following redirections.
func client(tb testing.TB) *http.Client {
	tb.Helper()
	tr := &http.Transport{DisableCompression: true}
	tb.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// request builds a request to the proxy; header holds pairs, of which Host is special.
func (r *rig) request(tb testing.TB, method, path string, body io.Reader, header ...string) *http.Request {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), method, "http://"+r.addr+path, body)
	if err != nil {
		tb.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
		} else {
			req.Header.Add(header[i], header[i+1])
		}
	}
	return req
}

// reply is an answer whose body has been read.
type reply struct {
	StatusCode      int
	Header, Trailer http.Header
	Proto           string
}

func do(tb testing.TB, c *http.Client, req *http.Request) (reply, string) {
	tb.Helper()
	res, err := c.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, res.Trailer, res.Proto}, string(body)
}

// get sends a GET and returns what came back.
func (r *rig) get(tb testing.TB, path string, header ...string) (reply, string) {
	tb.Helper()
	return do(tb, client(tb), r.request(tb, http.MethodGet, path, nil, header...))
}

// toGuest are the headers that reach a port of the test's sandbox.
func toGuest(port string) []string {
	return []string{headerSandboxID, string(testID), headerSandboxPort, port}
}

func failureOf(tb testing.TB, body string) wireFailure {
	tb.Helper()
	var f wireFailure
	if err := json.Unmarshal([]byte(body), &f); err != nil {
		tb.Fatalf("body %q: %v", body, err)
	}
	return f
}
