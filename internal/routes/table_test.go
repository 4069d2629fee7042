package routes_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
	"github.com/cloister-dev/cloister/internal/routes"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const running = agentv1.State_STATE_RUNNING

// server answers as a test says.
type server struct {
	proxyv1connect.UnimplementedRouteServiceHandler

	// asked takes every request to watch, streams what each is then sent; a closed one ends the stream.
	asked   chan *proxyv1.WatchRequest
	streams chan (chan *proxyv1.WatchResponse)

	mu      sync.Mutex
	known   map[string]*proxyv1.Route
	err     error
	lookups atomic.Int64
	block   chan struct{} // lookups wait for it to be closed
	link    *flakyLink
	reports []*proxyv1.ReportRequest
	ack     func(*proxyv1.ReportRequest) (int64, error)
}

func (s *server) Watch(ctx context.Context, req *proxyv1.WatchRequest, stream *connect.ServerStream[proxyv1.WatchResponse]) error {
	select {
	case s.asked <- req:
	case <-ctx.Done():
		return ctx.Err()
	}
	var messages chan *proxyv1.WatchResponse
	select {
	case messages = <-s.streams:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		select {
		case msg, more := <-messages:
			if !more {
				return connect.NewError(connect.CodeUnavailable, errors.New("the server stops"))
			}
			if err := stream.Send(msg); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *server) Lookup(_ context.Context, req *proxyv1.LookupRequest) (*proxyv1.LookupResponse, error) {
	s.lookups.Add(1)
	if s.block != nil {
		<-s.block
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	r := s.known[req.GetId()]
	if r == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	return &proxyv1.LookupResponse{Route: r, Node: &proxyv1.Node{Id: r.GetNodeId(), Address: "10.0.0.9:3004"}}, nil
}

func (s *server) Wake(_ context.Context, req *proxyv1.WakeRequest) (*proxyv1.WakeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	return &proxyv1.WakeResponse{Route: &proxyv1.Route{Id: req.GetId(), State: running, Generation: 9}}, nil
}

func (s *server) Sign(_ context.Context, req *proxyv1.SignRequest) (*proxyv1.SignResponse, error) {
	if req.GetPath() != "/f" || req.GetOperation() != "read" || req.GetUser() != "u" || req.GetSignature() != "v1_x" || req.GetExpiration() != "7" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("nobody signed that"))
	}
	return &proxyv1.SignResponse{Id: "i1"}, nil
}

func (s *server) Report(_ context.Context, req *proxyv1.ReportRequest) (*proxyv1.ReportResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reports = append(s.reports, req)
	if s.ack == nil {
		return &proxyv1.ReportResponse{AcknowledgedSequence: req.GetSequence()}, nil
	}
	ack, err := s.ack(req)
	return &proxyv1.ReportResponse{AcknowledgedSequence: ack}, err
}

// flakyLink is the way to a server; it breaks calls, but not what is watched.
type flakyLink struct {
	http.RoundTripper
	broken atomic.Int64 // calls that are still to break
}

func (l *flakyLink) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.HasSuffix(r.URL.Path, "/Watch") || strings.HasSuffix(r.URL.Path, "/Report") || l.broken.Add(-1) < 0 {
		return l.RoundTripper.RoundTrip(r)
	}
	return nil, errors.New("the link broke")
}

// proxy notes what it is told.
type proxy struct {
	changed chan sandbox.Route
	down    chan sandbox.NodeID
	mu      sync.Mutex
	asked   []time.Time
	uses    []sandbox.Activity
}

func (p *proxy) Changed(r sandbox.Route)      { p.changed <- r }
func (p *proxy) NodeDown(id sandbox.NodeID)   { p.down <- id }
func (p *proxy) set(uses ...sandbox.Activity) { p.mu.Lock(); defer p.mu.Unlock(); p.uses = uses }
func (p *proxy) sinces() []time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]time.Time(nil), p.asked...)
}

func (p *proxy) Activities(since time.Time) []sandbox.Activity {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, since)
	return p.uses
}

// rig is a running table.
type rig struct {
	*server
	*proxy
	table *routes.Table
	stop  func()
}

func newRig(t *testing.T, change func(*routes.Config)) *rig {
	t.Helper()
	s := &server{asked: make(chan *proxyv1.WatchRequest, 10), streams: make(chan (chan *proxyv1.WatchResponse), 10), known: map[string]*proxyv1.Route{}}
	_, h := proxyv1connect.NewRouteServiceHandler(s)
	web := httptest.NewServer(h)
	t.Cleanup(web.Close)
	s.link = &flakyLink{RoundTripper: web.Client().Transport}
	cfg := routes.Config{Server: proxyv1connect.NewRouteServiceClient(&http.Client{Transport: s.link}, web.URL), ReportEvery: time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	table, err := routes.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{server: s, proxy: &proxy{changed: make(chan sandbox.Route, 100), down: make(chan sandbox.NodeID, 100)}, table: table}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- table.Run(ctx, r.proxy) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// stream is what the next Watch is sent.
func (r *rig) stream() chan *proxyv1.WatchResponse {
	s := make(chan *proxyv1.WatchResponse)
	r.streams <- s
	return s
}

func route(id string, generation int64) *proxyv1.Route {
	return &proxyv1.Route{Id: id, NodeId: "aaaaaa", State: running, Generation: generation}
}

func whole(version int64, all ...*proxyv1.Route) *proxyv1.WatchResponse {
	return &proxyv1.WatchResponse{Table: "t", Version: version, Snapshot: true, Routes: all, Nodes: []*proxyv1.Node{{Id: "aaaaaa", Address: "10.0.0.1:3004"}}}
}

func (r *rig) want(t *testing.T, id sandbox.ID, generation int64) {
	t.Helper()
	got, err := r.table.Route(t.Context(), id)
	if err != nil || got.Generation != generation {
		t.Errorf("route of %s: %+v, %v; want generation %d", id, got, err, generation)
	}
}

func TestFollow(t *testing.T) {
	r := newRig(t, nil)
	s := r.stream()
	if req := <-r.server.asked; req.GetTable() != "" || req.GetVersion() != 0 {
		t.Errorf("the first request: %v", req)
	}
	if r.table.Ready() || r.table.StaleSince().IsZero() {
		t.Error("ready before anything came")
	}
	s <- &proxyv1.WatchResponse{Table: "t", Snapshot: true, Routes: []*proxyv1.Route{route("i1", 1)}}
	<-r.changed
	if r.table.Ready() {
		t.Error("ready with half a table")
	}
	s <- whole(7, route("i2", 1))
	<-r.changed
	s <- &proxyv1.WatchResponse{Table: "t", Version: 8, Routes: []*proxyv1.Route{route("i1", 2), {Id: "i2", Gone: true}}}
	if got := <-r.changed; got.ID != "i1" || got.Generation != 2 {
		t.Errorf("told of %+v", got)
	}
	if got := <-r.changed; got.ID != "i2" || got.State != sandbox.StateDeleted {
		t.Errorf("told of %+v", got)
	}
	if !r.table.Ready() || !r.table.StaleSince().IsZero() {
		t.Error("not ready with the whole table")
	}
	r.want(t, "i1", 2)
	if _, err := r.table.Route(t.Context(), "i2"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a forgotten one: %v", err)
	}
	if n, ok := r.table.Node("aaaaaa"); !ok || n.Address != "10.0.0.1:3004" || n.Down {
		t.Errorf("node %+v, %t", n, ok)
	}
	s <- &proxyv1.WatchResponse{Table: "t", Version: 9, Nodes: []*proxyv1.Node{{Id: "aaaaaa", Down: true}}}
	if id := <-r.down; id != "aaaaaa" {
		t.Errorf("node %s is down", id)
	}

	// The next watch goes on where this one broke off; meanwhile the table is what it was.
	close(s)
	s = r.stream()
	if req := <-r.server.asked; req.GetTable() != "t" || req.GetVersion() != 9 {
		t.Errorf("the second request: %v", req)
	}
	if r.table.StaleSince().IsZero() || !r.table.Ready() {
		t.Error("not stale, or not ready, without a server")
	}
	r.want(t, "i1", 2)

	// A whole table drops what it does not name.
	s <- whole(3, route("i3", 1))
	got := map[sandbox.ID]sandbox.State{}
	for range 2 {
		one := <-r.changed
		got[one.ID] = one.State
	}
	if diff := cmp.Diff(map[sandbox.ID]sandbox.State{"i3": sandbox.StateRunning, "i1": sandbox.StateDeleted}, got); diff != "" {
		t.Error(diff)
	}
	close(s)
}

// TestLookup checks that the server is asked once, however many ask for what the table lacks.
func TestLookup(t *testing.T) {
	r := newRig(t, nil)
	r.known["i5"] = &proxyv1.Route{Id: "i5", NodeId: "bbbbbb", State: running, Generation: 4}
	r.block = make(chan struct{})
	var wait sync.WaitGroup
	for range 50 {
		wait.Go(func() { r.want(t, "i5", 4) })
	}
	for r.lookups.Load() == 0 {
		<-time.After(time.Millisecond)
	}
	close(r.block)
	wait.Wait()
	r.want(t, "i5", 4)
	if n := r.lookups.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	if n, ok := r.table.Node("bbbbbb"); !ok || n.Address != "10.0.0.9:3004" {
		t.Errorf("node %+v, %t", n, ok)
	}
	if _, err := r.table.Route(t.Context(), "i6"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
}

// TestLookupLimits checks that an id is not called unknown by somebody who cannot know.
func TestLookupLimits(t *testing.T) {
	r := newRig(t, func(c *routes.Config) { c.LookupsPerSecond = 1 })
	r.mu().err = connect.NewError(connect.CodeUnavailable, errors.New("not connected"))
	if _, err := r.table.Route(t.Context(), "i1"); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("without a server: %v", err)
	}
	if _, err := r.table.Route(t.Context(), "i2"); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("too many: %v", err)
	}
	if n := r.lookups.Load(); n > 2 {
		t.Errorf("asked %d times", n)
	}
}

// mu returns the server with no call of it under way.
func (r *rig) mu() *server {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return r.server
}

func TestAwait(t *testing.T) {
	r := newRig(t, nil)
	s := r.stream()
	s <- whole(1, route("i1", 1))
	seen := <-r.changed
	type answer struct {
		route sandbox.Route
		err   error
	}
	out := make(chan answer, 1)
	await := func(ctx context.Context, id sandbox.ID, seen sandbox.Route) {
		got, err := r.table.Await(ctx, id, seen)
		out <- answer{got, err}
	}
	go await(t.Context(), "i1", seen)
	s <- &proxyv1.WatchResponse{Table: "t", Version: 2, Routes: []*proxyv1.Route{{Id: "i1", NodeId: "bbbbbb", State: running, Generation: 2}}}
	got := <-out
	if got.err != nil || got.route.Node != "bbbbbb" {
		t.Errorf("%+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go await(ctx, "i1", got.route)
	cancel()
	if left := <-out; !errors.Is(left.err, context.Canceled) {
		t.Errorf("a caller who left: %+v", left)
	}
	go await(t.Context(), "i1", got.route)
	s <- &proxyv1.WatchResponse{Table: "t", Version: 3, Routes: []*proxyv1.Route{{Id: "i1", Gone: true}}}
	if gone := <-out; !errors.Is(gone.err, sandbox.ErrNotFound) {
		t.Errorf("forgotten: %+v", gone)
	}
	close(s)
}

func TestWake(t *testing.T) {
	r := newRig(t, nil)
	if got, err := r.table.Wake(t.Context(), "i1"); err != nil || got.State != sandbox.StateRunning {
		t.Errorf("%+v, %v", got, err)
	}
	r.want(t, "i1", 9) // without waiting for the stream
	for code, kind := range map[connect.Code]error{
		connect.CodeFailedPrecondition: sandbox.ErrConflict, connect.CodeNotFound: sandbox.ErrNotFound,
		connect.CodeResourceExhausted: sandbox.ErrExhausted, connect.CodeUnavailable: sandbox.ErrUnavailable,
		connect.CodeInternal: sandbox.ErrUnavailable,
	} {
		r.mu().err = connect.NewError(code, errors.New("no"))
		if _, err := r.table.Wake(t.Context(), "i2"); !errors.Is(err, kind) {
			t.Errorf("%v gave %v, want %v", code, err, kind)
		}
	}
}

// TestLinkMadeAnew has requests wait for a link that broke a moment ago; a server that says no is not asked again.
func TestLinkMadeAnew(t *testing.T) {
	r := newRig(t, nil)
	r.mu().known["i2"] = route("i2", 4)
	r.link.broken.Store(2)
	if _, err := r.table.Wake(t.Context(), "i1"); err != nil {
		t.Errorf("wake: %v", err)
	}
	r.link.broken.Store(2)
	r.want(t, "i2", 4)
	asked := r.lookups.Load()
	r.mu().err = connect.NewError(connect.CodeUnavailable, errors.New("no"))
	if _, err := r.table.Route(t.Context(), "i3"); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("the server said no, and the table %v", err)
	}
	if n := r.lookups.Load() - asked; n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
}

func TestSignature(t *testing.T) {
	r := newRig(t, nil)
	if id, err := r.table.SandboxBySignature(t.Context(), "/f", "read", "u", "v1_x", "7"); id != "i1" || err != nil {
		t.Errorf("%s, %v", id, err)
	}
	if _, err := r.table.SandboxBySignature(t.Context(), "/g", "read", "u", "v1_x", "7"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// TestReport checks that what a report said counts as told only once it is acknowledged.
func TestReport(t *testing.T) {
	r := newRig(t, nil)
	if first := r.report(t, 0); !first.GetFull() || first.GetSequence() != 1 {
		t.Errorf("the first report: %v", first)
	}
	if second := r.report(t, 1); second.GetFull() || second.GetSequence() != 2 {
		t.Errorf("the second report: %v", second)
	}
	r.set(sandbox.Activity{ID: "i1", Open: 3, Last: time.Unix(9, 0)})
	used := r.report(t, r.reported()+1).GetActivities()
	if len(used) != 1 || used[0].GetId() != "i1" || used[0].GetOpen() != 3 || used[0].GetLast().AsTime().Unix() != 9 {
		t.Errorf("used: %v", used)
	}
	sinces := r.sinces()
	if !sinces[0].IsZero() || sinces[1].IsZero() {
		t.Errorf("asked for what was used since %v", sinces)
	}
	for _, ack := range []func(*proxyv1.ReportRequest) (int64, error){
		func(*proxyv1.ReportRequest) (int64, error) { return 0, nil },
		func(*proxyv1.ReportRequest) (int64, error) { return 0, errors.New("no") },
	} {
		r.acknowledge(ack)
		n := r.reported()
		r.report(t, n+1) // it was refused: what comes next is full
		if next := r.report(t, n+2); !next.GetFull() {
			t.Errorf("after a refusal: %v", next)
		}
		r.acknowledge(nil)
		n = r.reported()
		if next := r.report(t, n+2); next.GetFull() {
			t.Errorf("after an acknowledgement: %v", next)
		}
	}
}

func (r *rig) acknowledge(ack func(*proxyv1.ReportRequest) (int64, error)) {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	r.ack = ack
}

func (r *rig) reported() int {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return len(r.reports)
}

// report returns the report with the index, once it has come.
func (r *rig) report(t *testing.T, i int) *proxyv1.ReportRequest {
	t.Helper()
	for r.reported() <= i {
		if t.Context().Err() != nil {
			t.Fatal("no report")
		}
		<-time.After(time.Millisecond)
	}
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return r.reports[i]
}

// TestLeave checks that the server hears of the end before Leave returns, and that reports go on.
func TestLeave(t *testing.T) {
	started := time.Unix(7, 0)
	r := newRig(t, func(cfg *routes.Config) {
		cfg.Self = func() routes.Self {
			return routes.Self{Version: "v2", Address: "http://edge", Started: started, Connections: 3, Requests: 2}
		}
	})
	s := r.stream()
	s <- &proxyv1.WatchResponse{Table: "t", Version: 4, Snapshot: true}
	<-r.server.asked
	for !r.table.Ready() {
		<-time.After(time.Millisecond)
	}
	if err := r.table.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	i := r.reported() - 1
	for ; !r.report(t, i).GetLeaving(); i-- {
		if i == 0 {
			t.Fatal("no report says that the proxy leaves")
		}
	}
	got := r.report(t, i).GetProxy()
	if got.GetVersion() != "v2" || got.GetAddress() != "http://edge" || !got.GetStartedAt().AsTime().Equal(started) || got.GetConnections() != 3 ||
		got.GetRequests() != 2 || got.GetTable() != "t" || got.GetTableVersion() != 4 {
		t.Errorf("the proxy says of itself: %v", got)
	}
	if next := r.report(t, r.reported()); !next.GetLeaving() {
		t.Errorf("after it left: %v", next)
	}
	r.acknowledge(func(*proxyv1.ReportRequest) (int64, error) {
		return 0, connect.NewError(connect.CodeUnavailable, errors.New("away"))
	})
	if err := r.table.Leave(t.Context()); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("without a server: %v", err)
	}
	r.stop()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.table.Leave(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a table that does not run: %v", err)
	}
	close(s)
}

// TestUnheard checks that a server that has started anew, and does not know yet what runs on a node, takes no sandbox of that
// node away.
func TestUnheard(t *testing.T) {
	r := newRig(t, nil)
	whole := func(table string, unheard bool, all ...*proxyv1.Route) *proxyv1.WatchResponse {
		return &proxyv1.WatchResponse{
			Table: table, Version: 1, Snapshot: true, Routes: all, Nodes: []*proxyv1.Node{{Id: "aaaaaa", Unheard: unheard}},
		}
	}
	s := r.stream()
	s <- whole("t", false, route("i1", 1), route("i2", 1))
	for len(r.changed) < 2 {
		<-time.After(time.Millisecond)
	}
	close(s)
	s = r.stream()
	s <- whole("u", true)
	s <- &proxyv1.WatchResponse{Table: "u", Version: 2, Routes: []*proxyv1.Route{route("i2", 2)}}
	for len(r.changed) < 3 { // two that were new, and one that is another
		<-time.After(time.Millisecond)
	}
	r.want(t, "i1", 1)
	r.want(t, "i2", 2)
	s <- &proxyv1.WatchResponse{Table: "u", Version: 3, Nodes: []*proxyv1.Node{{Id: "aaaaaa"}}}
	for {
		if got := <-r.changed; got.State == sandbox.StateDeleted {
			if got.ID != "i1" {
				t.Errorf("gone: %+v", got)
			}
			break
		}
	}
	r.want(t, "i2", 2)
	close(s)
}
