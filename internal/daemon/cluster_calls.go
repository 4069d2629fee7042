package daemon

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/gen/cluster/v1/clusterv1connect"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// buildCluster puts the server's services behind its port, and opens it where somebody may come.
func (d *daemon) buildCluster(ctx context.Context) error {
	c, ctl := d.cluster, d.server.control
	calls, joins := http.NewServeMux(), http.NewServeMux()
	serve := func(path string, h http.Handler, roles ...sandbox.Role) { calls.Handle(path, fromMember(h, roles...)) }
	path, h := nodev1connect.NewNodeServiceHandler(ctl)
	serve(path, h, sandbox.RoleNode)
	path, h = proxyv1connect.NewRouteServiceHandler(ctl.RouteService(link.MemberFrom))
	serve(path, h, sandbox.RoleProxy)
	path, h = clusterv1connect.NewMemberServiceHandler(ctl)
	serve(path, h, sandbox.RoleNode, sandbox.RoleProxy)
	joins.Handle(clusterv1connect.NewJoinServiceHandler(ctl))
	c.hub = link.NewHub(link.HubConfig{
		Self: c.identity.Member(), TLS: c.identity.ServerTLS(), ClientTLS: c.identity.ClientTLS, JoinTLS: c.identity.JoinTLS(), Identify: auth.MemberOf,
		Join: joins, RPC: calls, Logger: d.log, OnUp: d.linkUp, OnDown: d.linkDown,
	})
	c.links = &links{hub: c.hub, reach: link.NewReach(link.ReachConfig{TLS: c.identity.ClientTLS, Via: c.hub}), route: ctl.NodeRoute}
	d.server.fleet.links.Store(c.links)
	promauto.With(d.metrics).NewGaugeFunc(prometheus.GaugeOpts{
		Name: "cloister_listed_proxies_missing", Help: "Proxies of the setting proxies that do not report; nothing counts as idle meanwhile.",
	}, func() float64 { return float64(ctl.ProxiesMissing()) })
	expected, err := d.membersExpected(ctx)
	if err != nil || !expected {
		return err
	}
	return c.Open(ctx)
}

// membersExpected reports whether somebody may come in: always at a server that has no node of its own, else where a join
// token is good or somebody has joined.
func (d *daemon) membersExpected(ctx context.Context) (bool, error) {
	if !d.roles.Node {
		return true, nil
	}
	members, err := d.server.store.Members(ctx)
	if err != nil {
		return false, fmt.Errorf("read members: %w", err)
	}
	tokens, err := d.server.store.Tokens(ctx)
	if err != nil {
		return false, fmt.Errorf("read join tokens: %w", err)
	}
	now := time.Now()
	for i := range tokens {
		if !tokens[i].Ended(now) {
			return true, nil
		}
	}
	return len(members) > 0, nil
}

func (d *daemon) linkUp(p link.Peer) {
	if p.Role == sandbox.RoleNode {
		d.server.control.NodeReachable(sandbox.NodeID(p.ID))
	}
	if p.Dialed != "" {
		d.server.control.ProxyReached(p.Dialed, p.ID)
	}
}

// linkDown has the node of a broken link get nothing new until it reports again.
func (d *daemon) linkDown(p link.Peer) {
	if p.Role == sandbox.RoleNode {
		d.server.control.NodeUnreachable(sandbox.NodeID(p.ID))
	}
}

// addLocal lets other members reach the node of this process by way of the server.
func (c *clusterRole) addLocal(n *nodeRole) {
	c.hub.AddLocal(n.agent.NodeID(), link.Handlers{Guest: n.dialFor, Artifact: n.artifacts})
}
