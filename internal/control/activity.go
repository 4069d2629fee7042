package control

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// reportWithin is how long a proxy may take from one report of activity to the next.
	reportWithin = 10 * time.Second
	// localReports is how often the proxy of this process is asked.
	localReports = 2 * time.Second
)

// activity is what the proxies have reported of the use of sandboxes. It is in memory only: after a restart every proxy
// reports in full.
type activity struct {
	started time.Time

	mu sync.Mutex
	// all means that it is known which proxies there are.
	all     bool
	proxies map[string]*proxyUse
	// listed are the proxies that this server dials.
	listed []*listedProxy
	// told is closed with the next report; nil where nobody waits for one.
	told chan struct{}
}

// proxyUse is what one proxy has reported.
type proxyUse struct {
	// there means that the proxy has a record: what it does not report is missing.
	there bool
	// listed means that this server dials the proxy, which has not left: likewise.
	listed bool
	// heard is when it last reported, asOf when what that says began to be gathered, as far as that is known; zero: it has not.
	heard, asOf time.Time
	sequence    int64
	self        proxySelf
	uses        map[sandbox.ID]sandbox.Activity
}

// proxySelf is what a proxy says of itself.
type proxySelf struct {
	address, version      string
	started               time.Time
	connections, requests int
	// table and at are how far it has followed the routes.
	table   string
	at      int64
	leaving bool
}

// newActivity returns an activity that knows of no proxy but those at the addresses that this server dials.
func newActivity(now time.Time, all bool, listed []string) *activity {
	a := &activity{started: now, all: all, proxies: make(map[string]*proxyUse)}
	for _, address := range listed {
		a.listed = append(a.listed, &listedProxy{address: address})
	}
	return a
}

// expected reports whether what the proxy does not report is missing.
func (p *proxyUse) expected() bool { return p.there || p.listed }

// loaded notes that every proxy that is there is known.
func (a *activity) loaded() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = true
}

// expect notes that a proxy is there, whose reports are missing until they come.
func (a *activity) expect(proxy string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ofLocked(proxy).there = true
}

// gone notes that a proxy is there no more. What it goes on to report, until it ends, counts still.
func (a *activity) gone(proxy string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ofLocked(proxy).there = false
}

// self notes what a proxy says of itself.
func (a *activity) self(proxy string, says proxySelf) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ofLocked(proxy).self = says
	if says.leaving {
		a.awayLocked(proxy)
	}
	a.tellLocked()
}

// news returns what is closed with the next report.
func (a *activity) news() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.told == nil {
		a.told = make(chan struct{})
	}
	return a.told
}

func (a *activity) tellLocked() {
	if a.told != nil {
		close(a.told)
		a.told = nil
	}
}

// each calls f with every proxy that is there or has reported lately.
func (a *activity) each(f func(id string, u *proxyUse)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, u := range a.proxies {
		f(id, u)
	}
}

func (a *activity) ofLocked(proxy string) *proxyUse {
	p := a.proxies[proxy]
	if p == nil {
		p = &proxyUse{uses: make(map[sandbox.ID]sandbox.Activity)}
		a.proxies[proxy] = p
	}
	return p
}

// forget notes that a proxy has left the cluster.
func (a *activity) forget(proxy string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.awayLocked(proxy)
	delete(a.proxies, proxy)
}

// report takes a proxy's report, which was gathered from asOf on, and returns the number up to which its reports are known: another than the report's
// where one before it is missing, so that the next must be full.
func (a *activity) report(proxy string, asOf time.Time, sequence int64, full bool, all []sandbox.Activity) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	p := a.ofLocked(proxy)
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
	p.heard, p.asOf, p.sequence = now, asOf, sequence
	return sequence
}

// of returns the requests that are open, and when a sandbox was last used, over all proxies. It is not complete while
// one of them is silent, while it is not known which there are, or while this server has not run for long enough for
// them to find it.
func (a *activity) of(id sandbox.ID, now time.Time) (open int, last time.Time, complete bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	complete = a.all && now.Sub(a.started) >= reportWithin
	for _, p := range a.proxies {
		u, heard := p.uses[id], now.Sub(p.heard) <= reportWithin
		if heard || p.expected() {
			open += u.Open
		}
		if u.Last.After(last) {
			last = u.Last
		}
		complete = complete && (heard || !p.expected())
	}
	for _, l := range a.listed {
		complete = complete && l.heard(a, now)
	}
	return open, last, complete
}

// prune forgets proxies that are there no more, and the use of sandboxes that are not known any more. It returns what the
// forgotten proxies have reported.
func (a *activity) prune(now time.Time, known func(sandbox.ID) bool) (past []sandbox.Activity) {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.proxies, func(_ string, p *proxyUse) bool {
		if p.expected() || now.Sub(p.heard) <= reportWithin {
			return false
		}
		past = slices.AppendSeq(past, maps.Values(p.uses))
		return true
	})
	for _, p := range a.proxies {
		maps.DeleteFunc(p.uses, func(id sandbox.ID, u sandbox.Activity) bool { return u.Open == 0 && !known(id) })
	}
	return past
}

// Activity returns how many requests to a sandbox are open and when it was last used, through whichever proxy. complete
// is false while a proxy has not reported in time: the truth may then be more.
func (c *Control) Activity(id sandbox.ID) (open int, last time.Time, complete bool) {
	return c.activity.of(id, time.Now())
}

// LocalProxy is the proxy of this process.
type LocalProxy interface {
	Follower
	// Activities returns every sandbox that was used after since.
	Activities(since time.Time) []sandbox.Activity
	// Open returns how many connections of clients are open, and how many requests.
	Open() (connections, requests int)
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
		c.activity.report(localProxy, now, sequence, sequence == 1, p.Activities(since))
		connections, requests := p.Open()
		c.activity.self(localProxy, proxySelf{connections: connections, requests: requests})
		since = now
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-c.ends.ask: // somebody must know now
		}
	}
}
