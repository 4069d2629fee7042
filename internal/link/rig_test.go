package link_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/auth"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Members of every rig.
var (
	server = sandbox.Member{Role: sandbox.RoleServer, ID: "server"}
	nodeA  = sandbox.Member{Role: sandbox.RoleNode, ID: "nodeaa"}
	nodeB  = sandbox.Member{Role: sandbox.RoleNode, ID: "nodebb"}
	proxyP = sandbox.Member{Role: sandbox.RoleProxy, ID: "proxyp"}
)

const box = sandbox.ID("ibox")

// rig is a cluster's authority, one hub, and what a test adds.
type rig struct {
	tb        testing.TB
	authority *auth.Authority
	hub       *link.Hub
	addr      string
	// up and down get every link's coming and going at the hub.
	up, down chan link.Peer
	stop     func()
}

// caller answers Get with who called.
type caller struct {
	agentv1connect.UnimplementedAgentServiceHandler

	name string
}

// Get answers an id made of this end's name and the caller's.
func (c *caller) Get(ctx context.Context, req *agentv1.GetRequest) (*agentv1.GetResponse, error) {
	if req.GetId() == "missing" {
		return nil, connect.NewError(connect.CodeNotFound, sandbox.NotFoundf("no sandbox missing"))
	}
	from, _ := link.MemberFrom(ctx)
	return &agentv1.GetResponse{Sandbox: &agentv1.Sandbox{Id: c.name + " for " + from.String()}}, nil
}

func rpcOf(name string) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(agentv1connect.NewAgentServiceHandler(&caller{name: name}))
	return mux
}

// get calls Get over a client.
func get(ctx context.Context, c *http.Client, id string) (string, error) {
	resp, err := agentv1connect.NewAgentServiceClient(c, link.BaseURL).Get(ctx, &agentv1.GetRequest{Id: id})
	return resp.GetSandbox().GetId(), err
}

func logger() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newRig(tb testing.TB) *rig {
	tb.Helper()
	authority, err := auth.NewAuthority("testing")
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{tb: tb, authority: authority, up: make(chan link.Peer, 100), down: make(chan link.Peer, 100)}
	own := r.identity(server)
	r.hub = link.NewHub(link.HubConfig{
		Self: server, TLS: own.ServerTLS(), ClientTLS: own.ClientTLS, JoinTLS: own.JoinTLS(),
		Join:     http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "joined") }),
		Identify: auth.MemberOf, RPC: rpcOf("server"), Logger: logger(),
		OnUp: func(p link.Peer) { r.up <- p }, OnDown: func(p link.Peer) { r.down <- p },
	})
	r.serve("127.0.0.1:0")
	tb.Cleanup(func() { r.stop() })
	return r
}

// serve runs the hub until stop.
func (r *rig) serve(addr string) {
	ln := listen(r.tb, addr)
	r.addr = ln.Addr().String()
	r.stop = run(r.tb, func(ctx context.Context) error { return r.hub.Serve(ctx, ln) })
}

func listen(tb testing.TB, addr string) net.Listener {
	tb.Helper()
	ln, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", addr)
	if err != nil {
		tb.Fatal(err)
	}
	return ln
}

// run runs f until the returned function is called, or the test ends.
func run(tb testing.TB, f func(context.Context) error) func() {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := f(ctx); err != nil {
			tb.Errorf("run: %v", err)
		}
	})
	stop := func() { cancel(); running.Wait() }
	tb.Cleanup(stop)
	return stop
}

func (r *rig) identity(m sandbox.Member) *auth.Identity {
	r.tb.Helper()
	i, err := r.authority.Issue(m, time.Hour, nil)
	if err != nil {
		r.tb.Fatal(err)
	}
	return i
}

// unlinked returns a member's link that does not run.
func (r *rig) unlinked(m sandbox.Member, h link.Handlers) *link.Link {
	return link.New(link.Config{
		Self: m, Servers: func() []string { return []string{r.addr} }, TLS: r.identity(m).ClientTLS, Handlers: h, Logger: logger(),
	})
}

// link returns a member's link that is up, bulk included, and what ends it.
func (r *rig) link(m sandbox.Member, h link.Handlers) (*link.Link, func()) {
	r.tb.Helper()
	l := r.unlinked(m, h)
	stop := run(r.tb, l.Run)
	r.wait("link of "+m.String(), func() bool { return link.Ready(l) && link.HubReady(r.hub, m) })
	return l, stop
}

// wait blocks until ok.
func (r *rig) wait(what string, ok func() bool) {
	r.tb.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			r.tb.Fatalf("%s: not within 20 s", what)
		}
	}
}

// reach returns a member's Reach.
func (r *rig) reach(m sandbox.Member, via link.Opener) *link.Reach {
	return link.NewReach(link.ReachConfig{TLS: r.identity(m).ClientTLS, Via: via})
}

// direct runs a node's listener and returns how it is reached.
func (r *rig) direct(m sandbox.Member, h link.Handlers) link.Endpoint {
	r.tb.Helper()
	ln := listen(r.tb, "127.0.0.1:0")
	l := link.NewListener(link.ListenerConfig{
		Node: sandbox.NodeID(m.ID), TLS: r.identity(m).ServerTLS(), Identify: auth.MemberOf, Handlers: h, Logger: logger(),
	})
	run(r.tb, func(ctx context.Context) error { return l.Serve(ctx, ln) })
	return link.Endpoint{Node: sandbox.NodeID(m.ID), Address: ln.Addr().String()}
}

// tcpGuest runs a TCP server as a sandbox's and returns the handlers of a node that has it.
func tcpGuest(tb testing.TB, serve func(*net.TCPConn)) link.Handlers {
	tb.Helper()
	ln := listen(tb, "127.0.0.1:0")
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer func() { _ = c.Close() }()
				serve(c.(*net.TCPConn)) //nolint:errcheck,forcetypeassert // a TCP listener's
			})
		}
	})
	tb.Cleanup(func() { _ = ln.Close(); serving.Wait() })
	return link.Handlers{Guest: func(ctx context.Context, _ sandbox.Member, _ sandbox.ID, _ uint16) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", ln.Addr().String())
	}}
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
}
