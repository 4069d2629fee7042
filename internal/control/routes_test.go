package control_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// aProxy says that a proxy calls.
func aProxy(context.Context) (sandbox.Member, bool) {
	return sandbox.Member{Role: sandbox.RoleProxy, ID: "pppppp"}, true
}

// routeClient returns a client of a server's routes, and of what is changed in them.
func routeClient(t *testing.T, c *control.Control, caller func(context.Context) (sandbox.Member, bool)) proxyv1connect.RouteServiceClient {
	t.Helper()
	_, h := proxyv1connect.NewRouteServiceHandler(c.RouteService(caller))
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return proxyv1connect.NewRouteServiceClient(srv.Client(), srv.URL)
}

// watch follows the routes from a version on; the stream ends with the test.
func watch(t *testing.T, client proxyv1connect.RouteServiceClient, table string, version int64) *connect.ServerStreamForClient[proxyv1.WatchResponse] {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := client.Watch(ctx, &proxyv1.WatchRequest{Table: table, Version: version})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = stream.Close() })
	return stream
}

func receive(t *testing.T, s *connect.ServerStreamForClient[proxyv1.WatchResponse]) *proxyv1.WatchResponse {
	t.Helper()
	if !s.Receive() {
		t.Fatal(s.Err())
	}
	return s.Msg()
}

// until receives messages until one names the sandbox, and returns its route.
func until(t *testing.T, s *connect.ServerStreamForClient[proxyv1.WatchResponse], id sandbox.ID, wanted func(*proxyv1.Route) bool) *proxyv1.Route {
	t.Helper()
	for {
		for _, r := range receive(t, s).GetRoutes() {
			if r.GetId() == string(id) && wanted(r) {
				return r
			}
		}
	}
}

func stateIs(state sandbox.State) func(*proxyv1.Route) bool {
	return func(r *proxyv1.Route) bool { return r.GetState().String() == "STATE_"+upper(string(state)) }
}

func TestWatchRoutes(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute, Secure: true, AutoPause: true, AutoResume: true})
	client := routeClient(t, c.Control, aProxy)
	s := watch(t, client, "", 0)
	first := receive(t, s)
	if !first.GetSnapshot() || first.GetVersion() == 0 || len(first.GetRoutes()) != 1 || len(first.GetNodes()) != 1 {
		t.Fatalf("first message %v", first)
	}
	want := sandbox.Route{ID: box.ID, Node: "aaaaaa", State: sandbox.StateRunning, Generation: 1, Secure: true, AutoResume: true}
	if diff := cmp.Diff(want, routeOf(first.GetRoutes()[0])); diff != "" {
		t.Error(diff)
	}
	if n := first.GetNodes()[0]; n.GetId() != "aaaaaa" || n.GetDown() {
		t.Errorf("node %v", n)
	}
	table, version := first.GetTable(), first.GetVersion()
	mustPause(t, c, box.ID)
	until(t, s, box.ID, stateIs(sandbox.StatePaused))

	// Who comes back with a version gets what has changed since, and nothing else.
	delta := receive(t, watch(t, client, table, version))
	if delta.GetSnapshot() || len(delta.GetRoutes()) != 1 || !stateIs(sandbox.StatePaused)(delta.GetRoutes()[0]) || delta.GetVersion() <= version {
		t.Errorf("delta %v", delta)
	}
	if again := receive(t, watch(t, client, table, delta.GetVersion())); again.GetSnapshot() || len(again.GetRoutes()) != 0 {
		t.Errorf("nothing has changed: %v", again)
	}
	if other := receive(t, watch(t, client, "another", version)); !other.GetSnapshot() {
		t.Errorf("a version of another server's life gave a delta: %v", other)
	}
	if err := c.Control.Kill(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
	until(t, s, box.ID, stateIs(sandbox.StateDeleted))
}

// TestWatchForgotten checks that followers are told of what the server forgets.
func TestWatchForgotten(t *testing.T) {
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.EndedMax = 1 })
	s := watch(t, routeClient(t, c.Control, aProxy), "", 0)
	receive(t, s)
	first, second := mustCreate(t, c, minute()), mustCreate(t, c, minute())
	for _, id := range []sandbox.ID{first.ID, second.ID} {
		if err := c.Control.Kill(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	until(t, s, first.ID, func(r *proxyv1.Route) bool { return r.GetGone() })
}

// TestWatchParts checks that a large table comes in parts, and that many changes of few sandboxes come as few routes.
func TestWatchParts(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	const n = 2500
	for range n {
		mustCreate(t, c, minute())
	}
	client := routeClient(t, c.Control, aProxy)
	s := watch(t, client, "", 0)
	ids, table, version := map[string]bool{}, "", int64(0)
	for parts := 1; version == 0; parts++ {
		msg := receive(t, s)
		if len(msg.GetRoutes()) > 1000 || !msg.GetSnapshot() {
			t.Fatalf("part %d has %d routes", parts, len(msg.GetRoutes()))
		}
		for _, r := range msg.GetRoutes() {
			ids[r.GetId()] = true
		}
		table, version = msg.GetTable(), msg.GetVersion()
	}
	if len(ids) != n {
		t.Errorf("%d routes, want %d", len(ids), n)
	}
	box := mustCreate(t, c, minute())
	for i := range 2000 {
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Duration(i+100)*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	msg := receive(t, watch(t, client, table, version))
	if len(msg.GetRoutes()) != 1 || msg.GetRoutes()[0].GetGeneration() != 2001 {
		t.Errorf("2,000 changes of one sandbox came as %d routes: %v", len(msg.GetRoutes()), msg.GetRoutes())
	}
}

// TestWatchBehind checks that who is further behind than changes are kept gets the whole table.
func TestWatchBehind(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	client := routeClient(t, c.Control, aProxy)
	first := receive(t, watch(t, client, "", 0))
	box := mustCreate(t, c, minute())
	for i := range 1 << 16 {
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Duration(i%1000+100)*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if msg := receive(t, watch(t, client, first.GetTable(), first.GetVersion())); !msg.GetSnapshot() || len(msg.GetRoutes()) != 1 {
		t.Errorf("%v", msg)
	}
}

// TestWatchSlow checks that a follower who reads nothing holds up nobody.
func TestWatchSlow(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	s := watch(t, routeClient(t, c.Control, aProxy), "", 0) // and never read
	for i := range 10_000 {
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Duration(i%1000+100)*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	last := until(t, s, box.ID, func(r *proxyv1.Route) bool { return r.GetGeneration() == 10_001 })
	if last.GetGone() {
		t.Error(last)
	}
}

func TestRouteCallsAreForProxies(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	callers := map[string]func(context.Context) (sandbox.Member, bool){
		"node": func(context.Context) (sandbox.Member, bool) {
			return sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}, true
		},
		"unknown": func(context.Context) (sandbox.Member, bool) { return sandbox.Member{}, false },
	}
	for name, caller := range callers {
		client := routeClient(t, c.Control, caller)
		ctx := t.Context()
		stream, err := client.Watch(ctx, &proxyv1.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if stream.Receive() || connect.CodeOf(stream.Err()) != connect.CodePermissionDenied {
			t.Errorf("%s: watch gave %v", name, stream.Err())
		}
		_ = stream.Close()
		_, lookup := client.Lookup(ctx, &proxyv1.LookupRequest{Id: "i0"})
		_, wake := client.Wake(ctx, &proxyv1.WakeRequest{Id: "i0"})
		_, sign := client.Sign(ctx, &proxyv1.SignRequest{})
		_, report := client.Report(ctx, &proxyv1.ReportRequest{})
		for call, err := range map[string]error{"lookup": lookup, "wake": wake, "sign": sign, "report": report} {
			if connect.CodeOf(err) != connect.CodePermissionDenied {
				t.Errorf("%s: %s gave %v", name, call, err)
			}
		}
	}
}

func TestLookup(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	client := routeClient(t, c.Control, aProxy)
	got, err := client.Lookup(t.Context(), &proxyv1.LookupRequest{Id: string(box.ID)})
	if err != nil || routeOf(got.GetRoute()).Node != "aaaaaa" || got.GetNode().GetId() != "aaaaaa" {
		t.Errorf("%v, %v", got, err)
	}
	for id, code := range map[string]connect.Code{"unknown": connect.CodeNotFound, "../etc": connect.CodeInvalidArgument} {
		if _, err := client.Lookup(t.Context(), &proxyv1.LookupRequest{Id: id}); connect.CodeOf(err) != code {
			t.Errorf("%s gave %v, want %v", id, err, code)
		}
	}
}

// follower notes what it is told.
type follower struct {
	mu    sync.Mutex
	told  []sandbox.Route
	downs []sandbox.NodeID
	news  chan struct{}
	uses  []sandbox.Activity
}

func (f *follower) Changed(r sandbox.Route) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, r)
	select {
	case f.news <- struct{}{}:
	default:
	}
}

func (f *follower) NodeDown(id sandbox.NodeID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.downs = append(f.downs, id)
}

func (f *follower) Activities(time.Time) []sandbox.Activity {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.uses
}

func (*follower) Open() (connections, requests int) { return 3, 2 }

// TestRunProxy checks what the proxy of the server's own process is told.
func TestRunProxy(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	f := &follower{news: make(chan struct{}, 1), uses: []sandbox.Activity{{ID: "i0", Open: 2, Last: time.Now()}}}
	done := make(chan error, 1)
	go func() { done <- c.Control.RunProxy(ctx, f) }()
	box := mustCreate(t, c, minute())
	for told := false; !told; {
		// What was created before the following began is no change: another one is.
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Hour); err != nil {
			t.Fatal(err)
		}
		select {
		case <-f.news:
			told = true
		case <-time.After(time.Millisecond):
		}
	}
	if open, last, _ := c.Control.Activity("i0"); open != 2 || last.IsZero() {
		t.Errorf("%d open, last used %v", open, last)
	}
	all, err := c.Control.ListProxies(t.Context())
	if err != nil || len(all) != 1 || all[0].State != control.ProxyReady || all[0].Connections != 3 || all[0].Requests != 2 {
		t.Errorf("proxies %+v, %v", all, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.ContainsFunc(f.told, func(r sandbox.Route) bool { return r.ID == box.ID && r.State == sandbox.StateRunning }) {
		t.Errorf("told %v", f.told)
	}
}

// TestAwait checks that waiting ends with the news, and with the sandbox.
func TestAwait(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	type answer struct {
		route sandbox.Route
		err   error
	}
	wait := func(seen sandbox.Route) chan answer {
		out := make(chan answer, 1)
		go func() {
			r, err := c.Control.Await(t.Context(), box.ID, seen)
			out <- answer{r, err}
		}()
		return out
	}
	seen := box.Route()
	out := wait(seen)
	mustPause(t, c, box.ID)
	got := <-out
	if got.err != nil || !got.route.News(seen) {
		t.Errorf("%+v", got)
	}
	now, err := c.Control.Route(t.Context(), box.ID)
	if err != nil {
		t.Fatal(err)
	}
	out = wait(now)
	if err := c.Control.Kill(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
	if got := <-out; got.err != nil || got.route.State != sandbox.StateDeleted {
		t.Errorf("%+v", got)
	}
	if _, err := c.Control.Await(t.Context(), "unknown", sandbox.Route{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("an unknown one: %v", err)
	}
}

// TestWatchAfterRestart checks what followers are told of a node that the server has not heard yet since its start: that it
// is not known what runs there, and no more, for as long as nodes may be silent.
func TestWatchAfterRestart(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	c.Restart(t, func(cfg *control.Config) {
		cfg.Limits.SuspectAfter, cfg.Limits.DownAfter = time.Millisecond, 2*time.Millisecond
	})
	client := routeClient(t, c.Control, aProxy)
	first := receive(t, watch(t, client, "", 0))
	if n := first.GetNodes(); len(n) != 1 || !n[0].GetUnheard() || n[0].GetDown() || len(first.GetRoutes()) != 0 {
		t.Fatalf("after the start: %v", first)
	}
	stream := watch(t, client, first.GetTable(), first.GetVersion())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Control.Run(ctx) }()
	named := false
	told := func(is func(*proxyv1.Node) bool) *proxyv1.WatchResponse {
		t.Helper()
		msg := receive(t, stream)
		for !slices.ContainsFunc(msg.GetNodes(), is) {
			if slices.ContainsFunc(msg.GetRoutes(), func(r *proxyv1.Route) bool { return r.GetId() == string(box.ID) }) {
				named = true
			}
			msg = receive(t, stream)
		}
		return msg
	}
	told(func(n *proxyv1.Node) bool { return n.GetDown() && n.GetUnheard() })
	cancel()
	<-done
	c.Join(t, c.Node)
	last := told(func(n *proxyv1.Node) bool { return !n.GetUnheard() })
	named = named || slices.ContainsFunc(last.GetRoutes(), func(r *proxyv1.Route) bool { return r.GetId() == string(box.ID) })
	if !named {
		t.Error("the node is heard before its sandbox is named")
	}
}
