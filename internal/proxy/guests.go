package proxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
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
	closed    bool
	joined    sync.WaitGroup // grows only under mu and while not closed
}

// conns are the connections to one sandbox, as it was at one time: those of net/http's path and those of the fast one.
type conns struct {
	transport *http.Transport
	pool      *pool
}

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
	generation int64
	conns
	open     map[openRequest]struct{}
	lastUsed time.Time
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
	gu := g.byID[dest.id]
	switch {
	case gu == nil:
		gu = &guest{generation: dest.generation, conns: g.newConns(dest.id), open: make(map[openRequest]struct{})}
		g.byID[dest.id] = gu
	case len(gu.open) >= g.maxRequests:
		return conns{}, stale, tooMany(dest.target)
	case gu.generation < dest.generation:
		stale = append(stale, gu.conns)
		gu.generation, gu.conns = dest.generation, g.newConns(dest.id)
	}
	gu.open[r] = struct{}{}
	gu.lastUsed = now
	g.joined.Add(1)
	return gu.conns, stale, nil
}

// leave takes a request out again.
func (g *guests) leave(id sandbox.ID, r openRequest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if gu := g.byID[id]; gu != nil {
		delete(gu.open, r)
	}
	g.joined.Done()
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

// sweepLocked forgets, now and then, sandboxes that nobody has asked for in a while. It returns what the caller shall
// forget after unlocking.
func (g *guests) sweepLocked(now time.Time) []conns {
	if now.Sub(g.lastSweep) < sweepInterval {
		return nil
	}
	g.lastSweep = now
	var stale []conns
	for id, gu := range g.byID {
		if len(gu.open) == 0 && now.Sub(gu.lastUsed) > guestTTL {
			stale = append(stale, gu.conns)
			delete(g.byID, id)
		}
	}
	return stale
}

func (g *guests) newConns(id sandbox.ID) conns {
	return conns{transport: g.newTransport(id), pool: newPool()}
}

// newTransport returns a pool of connections to one sandbox. A transport that was told to close its idle connections
// keeps none of those that become idle later either, so replacing it is enough to be rid of them.
func (g *guests) newTransport(id sandbox.ID) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return g.dial(ctx, id, addr)
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
func (g *guests) dial(ctx context.Context, id sandbox.ID, addr string) (net.Conn, error) {
	_, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &dialError{fmt.Errorf("dial sandbox %s: %w", id, err)}
	}
	port, err := parsePort(portText)
	if err != nil {
		return nil, &dialError{fmt.Errorf("dial sandbox %s: %w", id, err)}
	}
	conn, err := g.connect(ctx, id, port)
	if err != nil {
		return nil, err
	}
	return &guestConn{Conn: conn}, nil
}

// connect opens a connection to a port. Errors are dialErrors.
func (g *guests) connect(ctx context.Context, id sandbox.ID, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, g.dialTimeout)
	defer cancel()
	conn, err := g.dialer.DialGuest(ctx, id, port)
	g.metrics.dialed(err)
	if err != nil {
		return nil, &dialError{fmt.Errorf("dial sandbox %s port %d: %w", id, port, err)}
	}
	return conn, nil
}

// guestAddr is the authority that stands for a port inside a sandbox; only dial reads it.
func guestAddr(t target) string {
	return string(t.id) + ":" + strconv.Itoa(int(t.port))
}
