package control

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// reportWithin is how long a proxy may take from one report of activity to the next.
	reportWithin = 10 * time.Second
	// proxyGone is how long a proxy may be silent before it counts as gone.
	proxyGone = time.Minute
	// localReports is how often the proxy of this process is asked.
	localReports = 2 * time.Second
)

// activity is what the proxies have reported of the use of sandboxes. It is in memory only: after a restart every proxy
// reports in full.
type activity struct {
	started time.Time

	mu      sync.Mutex
	proxies map[string]*proxyUse
}

// proxyUse is what one proxy has reported.
type proxyUse struct {
	// heard is when it last reported; zero: it has not.
	heard time.Time
	// since is since when it has been expected.
	since    time.Time
	sequence int64
	uses     map[sandbox.ID]sandbox.Activity
}

func newActivity(now time.Time) *activity {
	return &activity{started: now, proxies: make(map[string]*proxyUse)}
}

// expect notes that a proxy is there, whose reports are missing until they come.
func (a *activity) expect(proxy string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.expectLocked(proxy)
}

func (a *activity) expectLocked(proxy string) *proxyUse {
	p := a.proxies[proxy]
	if p == nil {
		p = &proxyUse{since: time.Now(), uses: make(map[sandbox.ID]sandbox.Activity)}
		a.proxies[proxy] = p
	}
	return p
}

// forget notes that a proxy has left the cluster.
func (a *activity) forget(proxy string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.proxies, proxy)
}

// report takes a proxy's report and returns the number up to which its reports are known: another than the report's
// where one before it is missing, so that the next must be full.
func (a *activity) report(proxy string, sequence int64, full bool, all []sandbox.Activity) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	p := a.expectLocked(proxy)
	if !full && (p.heard.IsZero() || sequence != p.sequence+1) {
		return p.sequence
	}
	if full {
		for id, u := range p.uses {
			u.Open = 0 // what is open is in the report
			p.uses[id] = u
		}
	}
	for _, u := range all {
		if u.Last.After(now) {
			u.Last = now // its clock is ahead
		}
		if old := p.uses[u.ID].Last; old.After(u.Last) {
			u.Last = old
		}
		p.uses[u.ID] = u
	}
	p.heard, p.sequence = now, sequence
	return sequence
}

// of returns the requests that are open, and when a sandbox was last used, over all proxies. It is not complete while
// one of them is silent, or while this server has not run for long enough to know them.
func (a *activity) of(id sandbox.ID, now time.Time) (open int, last time.Time, complete bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	complete = now.Sub(a.started) >= reportWithin
	for _, p := range a.proxies {
		u := p.uses[id]
		open += u.Open
		if u.Last.After(last) {
			last = u.Last
		}
		complete = complete && now.Sub(p.heard) <= reportWithin
	}
	return open, last, complete
}

// prune forgets proxies that have been silent for long, and the use of sandboxes that are not known any more.
func (a *activity) prune(now time.Time, known func(sandbox.ID) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.proxies, func(_ string, p *proxyUse) bool {
		return now.Sub(p.heard) > proxyGone && now.Sub(p.since) > proxyGone
	})
	for _, p := range a.proxies {
		maps.DeleteFunc(p.uses, func(id sandbox.ID, u sandbox.Activity) bool { return u.Open == 0 && !known(id) })
	}
}

// Activity returns how many requests to a sandbox are open and when it was last used, through whichever proxy. complete
// is false while a proxy has not reported in time: the truth may then be more.
func (c *Control) Activity(id sandbox.ID) (open int, last time.Time, complete bool) {
	return c.activity.of(id, time.Now())
}

// expectProxies notes the proxies that have joined, which may not have found this server yet.
func (c *Control) expectProxies(ctx context.Context) {
	all, err := c.ListMembers(ctx)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "proxies not known: idle sandboxes are not told from used ones until they report", errAttr(err))
	}
	for _, m := range all {
		if m.Role == sandbox.RoleProxy {
			c.activity.expect(m.ID)
		}
	}
}

// ExpectProxy notes that a proxy belongs to the cluster: until it reports nothing is known to be idle. One that is silent
// for a minute counts as gone.
func (c *Control) ExpectProxy(id string) { c.activity.expect(id) }

// ForgetProxy notes that a proxy has left the cluster.
func (c *Control) ForgetProxy(id string) { c.activity.forget(id) }

// LocalProxy is the proxy of this process.
type LocalProxy interface {
	Follower
	// Activities returns every sandbox that was used after since.
	Activities(since time.Time) []sandbox.Activity
}

// localProxy names the proxy of this process among the others, whose ids have 6 characters.
const localProxy = "local"

// RunProxy tells the proxy of this process how routes change and takes what it is used for, until ctx ends.
func (c *Control) RunProxy(ctx context.Context, p LocalProxy) error {
	var wait sync.WaitGroup
	wait.Go(func() { c.followRoutes(ctx, p) })
	defer wait.Wait()
	tick := time.NewTicker(localReports)
	defer tick.Stop()
	var since time.Time
	for sequence := int64(1); ; sequence++ {
		now := time.Now()
		c.activity.report(localProxy, sequence, sequence == 1, p.Activities(since))
		since = now
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
