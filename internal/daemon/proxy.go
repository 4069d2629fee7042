package daemon

import (
	"context"
	"fmt"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/routes"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/telemetry"
)

// proxyRole is the part that carries traffic into sandboxes.
type proxyRole struct {
	handler *proxy.Proxy
	// table is the copy of the server's routes; nil where the server is in the same process.
	table *routes.Table
	// control is that server.
	control *control.Control
}

func (d *daemon) buildProxy(context.Context) error {
	p := &proxyRole{}
	cfg := proxy.Config{
		Domain: d.cfg.Domain, PublicHosts: publicHosts(d.cfg), Logger: d.log, Registerer: d.metrics,
		HTTP1: d.cfg.ProxyHTTP1, Ready: d.isReady,
	}
	if d.cfg.OTLPEndpoint != "" {
		cfg.Trace = func(ctx context.Context, method string, field func(string) string) (context.Context, func(int)) {
			return telemetry.SpanOf(ctx, "proxy "+method, method, field)
		}
	}
	if d.server != nil {
		p.control = d.server.control
		cfg.Router, cfg.Dialer, cfg.Signatures = p.control, d.server.fleet, signer{p.control}
	} else {
		table, err := routes.New(routes.Config{
			Server: proxyv1connect.NewRouteServiceClient(d.member.link.HTTPClient(), link.BaseURL), Logger: d.log, Registerer: d.metrics,
			Self: func() routes.Self { return d.proxySelf(p.handler) },
		})
		if err != nil {
			return fmt.Errorf("build routing table: %w", err)
		}
		p.table = table
		cfg.Router, cfg.Dialer, cfg.Signatures = table, remoteGuests{table, d.member.reach}, table
	}
	var err error
	if p.handler, err = proxy.New(cfg); err != nil {
		return fmt.Errorf("build proxy: %w", err)
	}
	d.proxy, d.traffic = p, p.handler
	return nil
}

// start keeps the proxy told of what changes.
func (p *proxyRole) start(ctx context.Context, loops *errgroup.Group) {
	if p.table != nil {
		loops.Go(func() error { return p.table.Run(ctx, p.handler) })
		return
	}
	loops.Go(func() error { return p.control.RunProxy(ctx, p.handler) })
}

// tableEvery is how often a starting proxy looks whether it has the routing table.
const tableEvery = 20 * time.Millisecond

// wait blocks until the proxy has the routing table, or ctx ends.
func (p *proxyRole) wait(ctx context.Context) {
	for !p.table.Ready() && sleepUntil(ctx, time.Now().Add(tableEvery)) {
	}
}

// remoteGuests reaches sandboxes of nodes elsewhere: directly, or by way of the server.
type remoteGuests struct {
	table *routes.Table
	reach *link.Reach
}

// DialGuest connects to a port of a sandbox.
func (g remoteGuests) DialGuest(ctx context.Context, node sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error) {
	at, _ := g.table.Node(node) // an unknown node is reached through the server
	return g.reach.Dial(ctx, link.Endpoint{Node: node, Address: at.Address}, link.GuestHead(node, id, port))
}

// signer finds sandboxes by signatures.
type signer struct{ control *control.Control }

// SandboxBySignature returns the sandbox whose token made the signature.
//
//nolint:revive // the parts of a signed address, as the proxy asks for them
func (s signer) SandboxBySignature(ctx context.Context, path, op, user, signature, expiration string) (sandbox.ID, error) {
	return s.control.SandboxBySignature(ctx, control.Signed{Path: path, Operation: op, User: user, Signature: signature, Expiration: expiration})
}
