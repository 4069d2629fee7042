package control

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// presenceLife is how long a proxy that has fallen silent is there still: nothing counts as idle meanwhile, since the
// proxy may go on carrying traffic.
const presenceLife = 30 * time.Second

// The states of proxies.
const (
	// ProxyReady has the routing table and reports.
	ProxyReady = "ready"
	// ProxyStarting has not got the routing table yet.
	ProxyStarting = "starting"
	// ProxyLeaving takes no new requests.
	ProxyLeaving = "leaving"
	// ProxySilent does not report; it may go on with what it has.
	ProxySilent = "silent"
	// ProxyUnreachable is one that the server dials and that does not answer; it may go on with what it has.
	ProxyUnreachable = "unreachable"
	// ProxyAbsent has joined, and is not there.
	ProxyAbsent = "absent"
)

// Proxy is one that is there, or that has joined.
type Proxy struct {
	ID, Name, Version string
	// Address is the URL by which clients reach it, as it says.
	Address string
	State   string
	// Since is when it started, HeardAt when it last reported; zero for one that is absent.
	Since, HeardAt time.Time
	// Connections are clients', Requests those that are open.
	Connections, Requests int
	// Behind is how many changes of routes it has not taken; -1 where that is not known.
	Behind int64
}

// noteProxy takes what a proxy's report says of the proxy itself.
func (c *Control) noteProxy(ctx context.Context, id string, req *proxyv1.ReportRequest) error {
	w := req.GetProxy()
	c.activity.self(id, proxySelf{
		address: w.GetAddress(), version: w.GetVersion(), started: timeFromWire(w.GetStartedAt()),
		connections: int(w.GetConnections()), requests: int(w.GetRequests()), table: w.GetTable(), at: w.GetTableVersion(), leaving: req.GetLeaving(),
	})
	if c.presences == nil || w == nil && !req.GetLeaving() {
		return nil
	}
	err := c.attendance.arrive(ctx, arrival{
		presence: store.Presence{
			Role: sandbox.RoleProxy, ID: id, Address: w.GetAddress(), Version: w.GetVersion(), Since: timeFromWire(w.GetStartedAt()).UTC(),
		},
		within: reportWithin, ttl: presenceLife, leaving: req.GetLeaving(), taken: make(chan struct{}),
	})
	if err != nil {
		return fmt.Errorf("note the report of proxy %s: %w", id, err)
	}
	return nil
}

// ListProxies returns the proxies that are there and those that have joined, by name; that of this process is among them.
func (c *Control) ListProxies(ctx context.Context) ([]Proxy, error) {
	members, err := c.ListMembers(ctx)
	if err != nil {
		return nil, err
	}
	known := make(map[string]Proxy)
	for _, m := range members {
		if m.Role == sandbox.RoleProxy {
			known[m.ID] = Proxy{ID: m.ID, Name: m.Name, Version: m.Version, State: ProxyAbsent, Behind: -1}
		}
	}
	for id, p := range c.attendance.all() {
		known[id] = Proxy{ID: id, Name: p.Name, Version: p.Version, Address: p.Address, Since: p.Since, State: ProxySilent, Behind: -1}
	}
	now, latest := time.Now(), c.routes.now()
	c.activity.each(func(id string, u *proxyUse) {
		if p, ok := known[id]; ok || id == localProxy {
			known[id] = c.withUse(p, id, u, now, latest)
		}
	})
	c.withMissing(known, now)
	return slices.SortedFunc(maps.Values(known), func(a, b Proxy) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	}), nil
}

// RemoveProxy takes a proxy that has joined out of the cluster, by id or name. Errors: ErrNotFound.
func (c *Control) RemoveProxy(ctx context.Context, idOrName string) error {
	all, err := c.ListMembers(ctx)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.Role == sandbox.RoleProxy && (m.ID == idOrName || m.Name == idOrName) {
			return c.expel(ctx, m.Member)
		}
	}
	return sandbox.NotFoundf("no proxy %.80q has joined: `cloister proxy ls` lists them", idOrName)
}

// withUse adds what a proxy has said of itself.
func (c *Control) withUse(p Proxy, id string, u *proxyUse, now time.Time, latest int64) Proxy {
	p.HeardAt = u.heard
	if u.heard.IsZero() || now.Sub(u.heard) > reportWithin {
		return p // what it said is old
	}
	p.Connections, p.Requests = u.self.connections, u.self.requests
	switch {
	case id == localProxy:
		p.ID, p.Name, p.Version, p.Address, p.State, p.Since, p.Behind = id, id, c.about.Version, c.about.ProxyURL, ProxyReady, c.started, 0
		return p
	case u.self.leaving:
		p.State = ProxyLeaving
	case u.self.table != c.routes.table:
		p.State = ProxyStarting
		return p
	default:
		p.State = ProxyReady
	}
	p.Address, p.Version, p.Since, p.Behind = u.self.address, u.self.version, u.self.started, max(latest-u.self.at, 0)
	return p
}
