package control

import (
	"slices"
	"time"
)

// listedProxy is one that this server dials, because its settings list it. Nothing counts as idle while it is not heard,
// for however long: unlike one that registers itself, it has no lease by whose end it is known to be gone.
type listedProxy struct {
	address string
	// id is that of the proxy that answered there; empty: none has yet.
	id string
	// away means that it has left by itself, or was removed, and has not come back.
	away bool
}

// heard reports whether what the proxy knows is known here.
//
// Preconditions: a.mu is held.
func (l *listedProxy) heard(a *activity, now time.Time) bool {
	p := a.proxies[l.id]
	return l.away || l.id != "" && p != nil && now.Sub(p.heard) <= reportWithin
}

// ProxyReached notes which proxy answers at an address that this server dials.
func (c *Control) ProxyReached(address, id string) {
	a := c.activity
	a.mu.Lock()
	defer a.mu.Unlock()
	i := slices.IndexFunc(a.listed, func(l *listedProxy) bool { return l.address == address })
	if i < 0 {
		return
	}
	if l := a.listed[i]; l.id != id {
		if before := a.proxies[l.id]; before != nil {
			before.listed = false // another machine has taken its place
		}
		l.id = id
	}
	a.listed[i].away = false
	a.ofLocked(id).listed = true
}

// ProxiesMissing returns how many of the proxies that this server dials are not heard now.
func (c *Control) ProxiesMissing() int {
	a, missing := c.activity, 0
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, l := range a.listed {
		if !l.heard(a, time.Now()) {
			missing++
		}
	}
	return missing
}

// awayLocked notes that a listed proxy carries no traffic until it comes back.
func (a *activity) awayLocked(proxy string) {
	for _, l := range a.listed {
		if l.id == proxy {
			l.away = true
		}
	}
	if p := a.proxies[proxy]; p != nil {
		p.listed = false
	}
}

// missing returns the listed proxies that are not heard.
func (a *activity) missing(now time.Time) []listedProxy {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []listedProxy
	for _, l := range a.listed {
		if !l.heard(a, now) {
			out = append(out, *l)
		}
	}
	return out
}

// withMissing adds the listed proxies that are not heard to those that are known by id.
func (c *Control) withMissing(known map[string]Proxy, now time.Time) {
	for _, l := range c.activity.missing(now) {
		p, ok := known[l.id]
		if !ok {
			known[l.address] = Proxy{ID: l.id, Name: l.address, State: ProxyUnreachable, Behind: -1}
			continue
		}
		p.State = ProxyUnreachable
		known[l.id] = p
	}
}
