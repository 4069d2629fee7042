package link

import (
	"context"
	"crypto/tls"
	"net"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// made is one life of a link that a server has made.
type made struct {
	*pair

	server sandbox.Member
	id     linkID
	// ended is closed when it is over.
	ended chan struct{}
}

// Await has a server make the link, on connections of ln, until ctx ends; then it closes them and returns when all has
// ended. It is for a member that cannot dial servers, in the place of Run. While the link to one server is up, those of others
// are refused.
func (l *Link) Await(ctx context.Context, ln net.Listener) error {
	defer l.client.CloseIdleConnections()
	l.mu.Lock()
	l.last = sandbox.Unavailablef("no server has come yet")
	l.mu.Unlock()
	return serveConns(ctx, ln, l.cfg.Logger, l.take)
}

// take takes one of a link's connections.
func (l *Link) take(ctx context.Context, raw net.Conn) error {
	c := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(hi *tls.ClientHelloInfo) (*tls.Config, error) {
		return settings(hi, l.cfg.AwaitTLS, tls.RequireAndVerifyClientCert, protoControl, protoBulk)
	}})
	if err := handshake(ctx, c); err != nil {
		return err
	}
	id, err := takeHello(c)
	if err != nil {
		return err
	}
	state := c.ConnectionState()
	server, err := l.cfg.Identify(state)
	if err == nil && server.Role != sandbox.RoleServer {
		err = sandbox.Deniedf("%s may not make a link: servers do", server)
	}
	if err == nil && state.NegotiatedProtocol == protoControl {
		err = l.takeControl(ctx, c, &made{pair: &pair{}, server: server, id: id, ended: make(chan struct{})})
	} else if err == nil {
		err = l.takeBulk(ctx, c, server, id)
	}
	if err != nil {
		refuse(c, err)
	}
	return err
}

// takeControl makes the connection the link, in place of the one that the server made before, and serves it until it ends.
func (l *Link) takeControl(ctx context.Context, c *tls.Conn, m *made) error {
	defer close(m.ended)
	if err := l.enter(m); err != nil {
		return err
	}
	defer l.forget(m)
	if err := accept(c); err != nil {
		return nil // it has gone again
	}
	s, err := newSession(c, false, false)
	if err != nil {
		return nil // likewise
	}
	defer s.close()
	if m.setControl(s) {
		l.carry(ctx, c.RemoteAddr().String(), m.pair, func(ctx context.Context) { <-ctx.Done() }) // the server keeps the bulk connection up
	}
	return nil
}

// enter makes m the link and waits until the one before is over. Errors: ErrConflict where that is up, to another server.
func (l *Link) enter(m *made) error {
	l.mu.Lock()
	old := l.made
	if old != nil && old.server != m.server && old.live() {
		l.mu.Unlock()
		return sandbox.Conflictf("%s has a link to %s already", l.cfg.Self, old.server)
	}
	l.made = m
	l.mu.Unlock()
	if old != nil {
		old.end()
		<-old.ended
	}
	return nil
}

func (l *Link) forget(m *made) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.made == m {
		l.made = nil
	}
}

// takeBulk adds the connection to the link that the server has made, and serves it until it ends.
func (l *Link) takeBulk(ctx context.Context, c *tls.Conn, server sandbox.Member, id linkID) error {
	l.mu.Lock()
	m := l.made
	l.mu.Unlock()
	if m == nil || m.server != server || m.id != id {
		return sandbox.Conflictf("the link that this bulk connection belongs to is over")
	}
	if err := accept(c); err != nil {
		return nil //nolint:nilerr // it has gone again
	}
	s, err := newSession(c, false, true)
	if err != nil {
		return nil //nolint:nilerr // likewise
	}
	serveBulk(ctx, m.pair, s, l.takeStream)
	return nil
}
