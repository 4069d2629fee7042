package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// tracked is a connection that the end of its sandbox closes.
type tracked interface {
	// abort closes the connection at once, with what is not sent yet thrown away.
	abort()
	// unseen reports whether no server hears of it.
	unseen() bool
}

// Conn is a TCP connection into a sandbox. It is a *net.TCPConn with all that one can do; only Close differs.
type Conn struct {
	*net.TCPConn
	in    *instance
	local bool
}

// NetConn returns the connection itself, for callers that look for a *net.TCPConn in order to splice.
func (c *Conn) NetConn() net.Conn { return c.TCPConn }

// Close closes the connection.
func (c *Conn) Close() error {
	c.in.untrack(c)
	return c.TCPConn.Close()
}

func (c *Conn) unseen() bool { return c.local }

func (c *Conn) abort() {
	_ = c.SetLinger(0) // without it, what the peer was sent is merely kept longer
	_ = c.TCPConn.Close()
}

// otherConn is a connection that a dialer other than TCP's made.
type otherConn struct {
	net.Conn
	in    *instance
	local bool
}

// Close closes the connection.
func (c *otherConn) Close() error {
	c.in.untrack(c)
	return c.Conn.Close()
}

func (c *otherConn) abort() { _ = c.Conn.Close() }

func (c *otherConn) unseen() bool { return c.local }

// DialGuest connects to a port of a running sandbox, also if its server listens on the sandbox's loopback alone. The connection is closed when the sandbox ends, at once and whatever
// is under way. Errors: ErrNotFound for a sandbox that is not here or has ended, whose text says why; ErrConflict for
// one that is paused, or on its way to or from there; ErrUnavailable
// when the sandbox does not accept, which wraps the dialer's error (such as ECONNREFUSED).
func (a *Agent) DialGuest(ctx context.Context, id sandbox.ID, port uint16) (net.Conn, error) {
	return a.dialGuest(ctx, id, port, false)
}

// DialLocal is DialGuest for this machine's own users, of whom no server hears from a proxy: the node itself reports that the
// sandbox is in use.
func (a *Agent) DialLocal(ctx context.Context, id sandbox.ID, port uint16) (net.Conn, error) {
	return a.dialGuest(ctx, id, port, true)
}

func (a *Agent) dialGuest(ctx context.Context, id sandbox.ID, port uint16, local bool) (net.Conn, error) {
	in, ok := a.get(id)
	if !ok {
		return nil, sandbox.NotFoundf("sandbox %.80q is not on node %s", string(id), a.node)
	}
	addr, err := in.dialable()
	if err != nil {
		return nil, err
	}
	c, err := a.dialPort(ctx, in, netip.AddrPortFrom(addr, port).String(), port)
	if err != nil {
		if _, gone := in.dialable(); gone != nil {
			return nil, gone
		}
		return nil, fmt.Errorf("dial port %d of sandbox %s: %w: %w", port, id, sandbox.ErrUnavailable, err)
	}
	return in.track(c, local)
}

// dialable returns where the sandbox is, or why nobody can connect to it.
func (in *instance) dialable() (netip.Addr, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.rec.Network.GuestAddr, in.refusal()
}

// refusal says why nobody can connect to the sandbox; nil when one can.
//
// Preconditions: in.mu is held.
func (in *instance) refusal() error {
	switch r := &in.rec; {
	case r.State == sandbox.StateCreating:
		return sandbox.NotFoundf("sandbox %s is not running yet", in.id)
	case r.State == sandbox.StatePausing, r.State == sandbox.StatePaused, r.State == sandbox.StateResuming, r.State == sandbox.StateMigrating:
		return in.unfit(r)
	case in.departing && r.State == sandbox.StateRunning:
		return sandbox.Conflictf("sandbox %s is about to move to another node: try again in a moment", in.id)
	case in.exit != nil && !r.State.Ended():
		return sandbox.NotFoundf("sandbox %s has ended: %s", in.id, exitReason(in.exit, r.Resources))
	case r.State != sandbox.StateRunning || in.closed:
		return sandbox.NotFoundf("sandbox %s is %s: %s", in.id, r.State, ending(r))
	}
	return nil
}

// ending says why a sandbox has ended or is to end.
func ending(r *journal.Record) string {
	switch {
	case r.Reason != "":
		return r.Reason
	case r.Ending.Reason != "":
		return r.Ending.Reason
	}
	return "it is being ended"
}

// track makes the sandbox's end close the connection.
func (in *instance) track(c net.Conn, local bool) (net.Conn, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if err := in.refusal(); err != nil {
		_ = c.Close() // never used
		return nil, err
	}
	if in.conns == nil {
		in.conns = map[tracked]struct{}{}
	}
	in.usedAt = now()
	if tcp, ok := c.(*net.TCPConn); ok {
		t := &Conn{TCPConn: tcp, in: in, local: local}
		in.conns[t] = struct{}{}
		return t, nil
	}
	t := &otherConn{Conn: c, in: in, local: local}
	in.conns[t] = struct{}{}
	return t, nil
}

func (in *instance) untrack(t tracked) {
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.conns, t)
	in.usedAt = now()
	if in.departing {
		signal(in.quiet)
	}
}

// closeConns closes every connection into the sandbox, and lets nobody make another.
func (in *instance) closeConns() {
	in.mu.Lock()
	conns := in.conns
	in.conns, in.closed = nil, true
	in.mu.Unlock()
	for t := range conns {
		t.abort()
	}
}
