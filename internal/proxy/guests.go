package proxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Limits of the connections that are kept to guests.
const (
	maxIdlePerPort       = 64
	maxIdlePerSandbox    = 128
	idleConnTimeout      = 75 * time.Second
	guestTTL             = 2 * time.Minute
	sweepInterval        = time.Minute
	expectTimeout        = time.Second
	maxGuestHeaderBytes  = 1 << 20
	guestConnReadBuffer  = 8 << 10
	guestConnWriteBuffer = 8 << 10
)

// guests holds the connections to sandboxes, and which requests are open on each.
type guests struct {
	dialer      dialer
	dialTimeout time.Duration
	maxRequests int
	metrics     *metrics

	mu        sync.Mutex
	byID      map[sandbox.ID]*guest
	lastSweep time.Time
	// wanted is set once somebody asks what sandboxes are used for; what they were used for up to acknowledged is known.
	wanted       bool
	acknowledged time.Time
	closed       bool
	joined       sync.WaitGroup // grows only under mu and while not closed
}

// conns are the connections to one sandbox, as it was at one time: those of net/http's path and those of the fast one.
type conns struct {
	transport *http.Transport
	pool      *pool
	pulse     *pulse
}

// pulse is when a byte last passed to or from a sandbox.
type pulse struct{ last atomic.Int64 } // in nanoseconds of Unix time

func (p *pulse) beat() { p.last.Store(time.Now().UnixNano()) }

// forget closes what is idle, now and whenever it becomes so.
func (c conns) forget() {
	c.transport.CloseIdleConnections()
	c.pool.close()
}

// openRequest is a request on its way, on either path.
type openRequest interface {
	// cut ends the request from outside. It may be called after the request has left.
	cut(why error)
}

// guest is one sandbox. Its fields are guarded by guests.mu.
type guest struct {
	route sandbox.Route // the newest by which a request has come
	conns
	open map[openRequest]struct{}
	// joined is when a request last came or went.
	joined time.Time
}

// lastUsed is when a request last came or went, or a byte passed.
func (gu *guest) lastUsed() time.Time {
	if beat := time.Unix(0, gu.pulse.last.Load()); beat.After(gu.joined) {
		return beat
	}
	return gu.joined
}

// join enters a request and gives it the connections to its sandbox. A leave follows every join that did not fail.
func (g *guests) join(dest destination, r openRequest) (conns, *failure) {
	c, stale, fail := g.enter(dest, r, time.Now())
	for _, old := range stale {
		old.forget()
	}
	return c, fail
}

// enter does join's work under the lock; the caller forgets what it returns.
func (g *guests) enter(dest destination, r openRequest, now time.Time) (conns, []conns, *failure) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return conns{}, nil, shuttingDown(dest.target, errShutdown)
	}
	stale := g.sweepLocked(now)
	if gu := g.byID[dest.id]; gu != nil && len(gu.open) >= g.maxRequests {
		return conns{}, stale, tooMany(dest.target)
	}
	g.joined.Add(1)
	c, old := g.putLocked(dest, r, now)
	return c, append(stale, old...), nil
}

// putLocked makes a request one of its sandbox's. It returns the connections to where that runs now, and those to where
// it was.
func (g *guests) putLocked(dest destination, r openRequest, now time.Time) (conns, []conns) {
	gu := g.byID[dest.id]
	var stale []conns
	switch {
	case gu == nil:
		gu = &guest{route: dest.route, conns: g.newConns(dest.route, &pulse{}), open: make(map[openRequest]struct{})}
		g.byID[dest.id] = gu
	case gu.route.Generation < dest.route.Generation:
		stale = append(stale, gu.conns)
		gu.route, gu.conns = dest.route, g.newConns(dest.route, gu.pulse)
	}
	gu.open[r] = struct{}{}
	gu.joined = now
	return gu.conns, stale
}

// move gives a request that has joined the connections to where its sandbox is now.
func (g *guests) move(dest destination, r openRequest) (conns, *failure) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return conns{}, shuttingDown(dest.target, errShutdown)
	}
	c, stale := g.putLocked(dest, r, time.Now())
	g.mu.Unlock()
	for _, old := range stale {
		old.forget()
	}
	return c, nil
}

// leave takes a request out again.
func (g *guests) leave(id sandbox.ID, r openRequest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if gu := g.byID[id]; gu != nil {
		delete(gu.open, r)
		gu.joined = time.Now()
	}
	g.joined.Done()
}

// changed takes the news of a sandbox's route.
func (g *guests) changed(r sandbox.Route) {
	switch {
	case r.State.Ended():
		g.drop(r.ID, errSandboxEnded)
	case r.State != sandbox.StateRunning:
		g.release(r.ID)
	}
}

// release closes the idle connections to a sandbox, and those of its open requests when these end.
func (g *guests) release(id sandbox.ID) {
	g.mu.Lock()
	gu := g.byID[id]
	if gu == nil {
		g.mu.Unlock()
		return
	}
	old := gu.conns
	gu.conns = g.newConns(gu.route, gu.pulse)
	g.mu.Unlock()
	old.forget()
}

// nodeDown cuts the open requests to the sandboxes of a node.
func (g *guests) nodeDown(node sandbox.NodeID) {
	var there []*guest
	g.mu.Lock()
	for id, gu := range g.byID {
		if gu.route.Node == node {
			there = append(there, gu)
			delete(g.byID, id)
		}
	}
	g.mu.Unlock()
	for _, gu := range there {
		gu.cut(errSandboxEnded)
	}
}

// activities returns what was used after since.
func (g *guests) activities(since time.Time) []sandbox.Activity {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wanted = true
	if since.After(g.acknowledged) {
		g.acknowledged = since
	}
	var out []sandbox.Activity
	for id, gu := range g.byID {
		if last := gu.lastUsed(); last.After(since) {
			out = append(out, sandbox.Activity{ID: id, Open: len(gu.open), Last: last})
		}
	}
	return out
}

// drop cuts a sandbox's open requests and forgets its connections.
func (g *guests) drop(id sandbox.ID, why error) {
	g.mu.Lock()
	gu := g.byID[id]
	delete(g.byID, id)
	g.mu.Unlock()
	gu.cut(why)
}

// close drops every sandbox and lets nobody join any more; joined tells when all have left.
func (g *guests) close(why error) {
	g.mu.Lock()
	all := g.byID
	g.byID, g.closed = make(map[sandbox.ID]*guest), true
	g.mu.Unlock()
	for _, gu := range all {
		gu.cut(why)
	}
}

// cut ends everything of a guest that is in no map any more, so that nobody else changes it.
func (gu *guest) cut(why error) {
	if gu == nil {
		return
	}
	for r := range gu.open {
		r.cut(why)
	}
	gu.forget()
}

// sweepLocked forgets, now and then, sandboxes that nobody has asked for in a while, and of whose last use those who want
// to know have been told. It returns what the caller shall forget after unlocking.
func (g *guests) sweepLocked(now time.Time) []conns {
	if now.Sub(g.lastSweep) < sweepInterval {
		return nil
	}
	g.lastSweep = now
	var stale []conns
	for id, gu := range g.byID {
		last := gu.lastUsed()
		if len(gu.open) == 0 && now.Sub(last) > guestTTL && (!g.wanted || !last.After(g.acknowledged)) {
			stale = append(stale, gu.conns)
			delete(g.byID, id)
		}
	}
	return stale
}

func (g *guests) newConns(r sandbox.Route, p *pulse) conns {
	return conns{transport: g.newTransport(r, p), pool: newPool(), pulse: p}
}

// newTransport returns a pool of connections to one sandbox. A transport that was told to close its idle connections
// keeps none of those that become idle later either, so replacing it is enough to be rid of them.
func (g *guests) newTransport(r sandbox.Route, p *pulse) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return g.dial(ctx, r, addr, p)
		},
		DisableCompression:     true, // bytes pass as they are
		MaxIdleConns:           maxIdlePerSandbox,
		MaxIdleConnsPerHost:    maxIdlePerPort,
		IdleConnTimeout:        idleConnTimeout,
		ExpectContinueTimeout:  expectTimeout,
		MaxResponseHeaderBytes: maxGuestHeaderBytes,
		ReadBufferSize:         guestConnReadBuffer,
		WriteBufferSize:        guestConnWriteBuffer,
	}
}

// dialError marks an error of connecting, as opposed to one of talking.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// dial connects to the port in addr, which is guestAddr's.
func (g *guests) dial(ctx context.Context, r sandbox.Route, addr string, p *pulse) (net.Conn, error) {
	_, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &dialError{fmt.Errorf("dial sandbox %s: %w", r.ID, err)}
	}
	port, err := parsePort(portText)
	if err != nil {
		return nil, &dialError{fmt.Errorf("dial sandbox %s: %w", r.ID, err)}
	}
	conn, err := g.connect(ctx, r, port)
	if err != nil {
		return nil, err
	}
	return &guestConn{Conn: conn, pulse: p}, nil
}

// connect opens a connection to a port of a sandbox where it runs. Errors are dialErrors.
func (g *guests) connect(ctx context.Context, r sandbox.Route, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, g.dialTimeout)
	defer cancel()
	conn, err := g.dialer.DialGuest(ctx, r.Node, r.ID, port)
	g.metrics.dialed(err)
	if err != nil {
		return nil, &dialError{fmt.Errorf("dial sandbox %s port %d: %w", r.ID, port, err)}
	}
	return conn, nil
}

// guestAddr is the authority that stands for a port inside a sandbox; only dial reads it.
func guestAddr(t target) string {
	return string(t.id) + ":" + strconv.Itoa(int(t.port))
}
