package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

const (
	// presenceLife is how long a proxy that has fallen silent is there still: nothing counts as idle meanwhile, since the
	// proxy may go on carrying traffic.
	presenceLife = 30 * time.Second
	// silenceEvery is how often it is looked who has fallen silent.
	silenceEvery = time.Second
	// maxArrivals bounds the reports that wait to be looked at; whoever comes then waits.
	maxArrivals = 256
)

// presences keeps which proxies there are. Attend keeps a record until ctx ends, and for at most ttl longer.
type presences interface {
	Attend(ctx context.Context, p store.Presence, ttl time.Duration) error
	RemovePresence(ctx context.Context, m sandbox.Member) error
	WatchPresences(ctx context.Context, w store.Watcher[store.Presence]) error
}

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

// attendance is who is there by the store's records.
type attendance struct {
	mu sync.Mutex
	// there is by id.
	there map[string]store.Presence
	// arrivals hands reports to Run, which keeps the records of those who report here.
	arrivals chan arrival
}

// arrival is one proxy's report.
type arrival struct {
	presence store.Presence
	leaving  bool
	// taken is closed when the record of one that leaves is gone.
	taken chan struct{}
}

func newAttendance() *attendance {
	return &attendance{there: make(map[string]store.Presence), arrivals: make(chan arrival, maxArrivals)}
}

// runPresences keeps the records of the proxies that report to this server, and follows those of all, until ctx ends.
func (c *Control) runPresences(ctx context.Context) {
	if c.presences == nil {
		return
	}
	var g errgroup.Group
	g.Go(func() error { return c.presences.WatchPresences(ctx, c.presenceWatcher()) })
	g.Go(func() error {
		(&keeper{control: c, stays: make(map[string]*stay), removed: make(map[string]<-chan struct{})}).run(ctx)
		return nil
	})
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		c.log.LogAttrs(ctx, slog.LevelError, "proxies are not followed: nothing counts as idle any more", errAttr(err))
	}
}

// presenceWatcher expects reports of every proxy that has a record, and of no other.
func (c *Control) presenceWatcher() store.Watcher[store.Presence] {
	put := func(r store.Record[store.Presence]) {
		if r.Value.Role != sandbox.RoleProxy {
			return
		}
		c.attendance.mu.Lock()
		c.attendance.there[r.Value.ID] = r.Value
		c.attendance.mu.Unlock()
		c.activity.expect(r.Value.ID)
	}
	gone := func(id string) {
		c.attendance.mu.Lock()
		delete(c.attendance.there, id)
		c.attendance.mu.Unlock()
		c.activity.gone(id)
	}
	return store.Watcher[store.Presence]{
		Reset: func(records []store.Record[store.Presence], _ int64) {
			named := make(map[string]bool, len(records))
			for _, r := range records {
				named[r.Value.ID] = true
				put(r)
			}
			for id := range c.attendance.all() {
				if !named[id] {
					gone(id)
				}
			}
			c.activity.loaded()
		},
		Put: put,
		Delete: func(name string, _ int64) {
			if id, ok := strings.CutPrefix(name, string(sandbox.RoleProxy)+"/"); ok {
				gone(id)
			}
		},
	}
}

// all returns who is there, by id.
func (a *attendance) all() map[string]store.Presence {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.there)
}

// arrive takes a proxy's report. It returns at once, or, of one that leaves, when its record is gone.
func (a *attendance) arrive(ctx context.Context, v arrival) error {
	select {
	case a.arrivals <- v:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !v.leaving {
		return nil
	}
	select {
	case <-v.taken:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keeper keeps the records of the proxies that report to this server. One goroutine has it.
type keeper struct {
	control *Control
	stays   map[string]*stay
	// removed is closed once the record of a proxy that left is gone: one that is back waits for that.
	removed map[string]<-chan struct{}
	keeping sync.WaitGroup
}

// stay is the keeping of one proxy's record.
type stay struct {
	presence store.Presence
	heard    time.Time
	end      context.CancelFunc
	ended    chan struct{}
}

// run keeps records until ctx ends; they stay for whoever takes over.
func (k *keeper) run(ctx context.Context) {
	defer k.keeping.Wait()
	tick := time.NewTicker(silenceEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			maps.DeleteFunc(k.stays, func(_ string, s *stay) bool { return s.silent(now) })
		case v := <-k.control.attendance.arrivals:
			k.take(ctx, v)
		}
	}
}

// silent ends the keeping of a record whose proxy has not reported in time.
func (s *stay) silent(now time.Time) bool {
	if now.Sub(s.heard) <= reportWithin {
		return false
	}
	s.end()
	return true
}

// take takes one report.
func (k *keeper) take(ctx context.Context, v arrival) {
	id := v.presence.ID
	s := k.stays[id]
	switch {
	case v.leaving:
		delete(k.stays, id)
		k.removed[id] = v.taken
		k.keeping.Go(func() { k.remove(ctx, s, v) })
		return
	case s != nil && s.presence != v.presence: // it has started anew
		s.end()
		s = nil
	}
	if s == nil {
		s = k.keep(ctx, v.presence)
		k.stays[id] = s
	}
	s.heard = time.Now()
}

// keep begins to keep a record.
func (k *keeper) keep(ctx context.Context, p store.Presence) *stay {
	ctx, cancel := context.WithCancel(ctx)
	s := &stay{presence: p, end: cancel, ended: make(chan struct{})}
	before := k.removed[p.ID]
	delete(k.removed, p.ID)
	k.keeping.Go(func() {
		defer close(s.ended)
		defer cancel()
		if before != nil {
			<-before
		}
		p.Name = k.control.memberName(ctx, sandbox.Member{Role: p.Role, ID: p.ID})
		if err := k.control.presences.Attend(ctx, p, presenceLife); err != nil && ctx.Err() == nil {
			k.control.log.LogAttrs(ctx, slog.LevelError, "the record of a proxy is not kept", slog.String("proxy", p.ID), errAttr(err))
		}
	})
	return s
}

// remove takes the record of a proxy away that leaves, once nobody keeps it.
func (k *keeper) remove(ctx context.Context, s *stay, v arrival) {
	defer close(v.taken)
	if s != nil {
		s.end()
		<-s.ended
	}
	m := sandbox.Member{Role: v.presence.Role, ID: v.presence.ID}
	if err := k.control.presences.RemovePresence(ctx, m); err != nil && ctx.Err() == nil {
		k.control.log.LogAttrs(ctx, slog.LevelWarn, "the record of a proxy that leaves stays until its lease ends", slog.String("proxy", m.ID), errAttr(err))
	}
}

// memberName is what a member was called when it joined; empty where that is not known.
func (c *Control) memberName(ctx context.Context, m sandbox.Member) string {
	if c.joining.members == nil {
		return ""
	}
	known, err := c.joining.members.Member(ctx, m)
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		c.log.LogAttrs(ctx, slog.LevelWarn, "name of a member not read", slog.String("member", m.String()), errAttr(err))
	}
	return known.Name
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
		leaving: req.GetLeaving(), taken: make(chan struct{}),
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

// dismiss takes the record of a proxy away that is no member any more.
func (c *Control) dismiss(ctx context.Context, id string) {
	c.activity.forget(id)
	if c.presences == nil {
		return
	}
	v := arrival{presence: store.Presence{Role: sandbox.RoleProxy, ID: id}, leaving: true, taken: make(chan struct{})}
	if err := c.attendance.arrive(ctx, v); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "the record of a proxy that left stays until its lease ends", slog.String("proxy", id), errAttr(err))
	}
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
