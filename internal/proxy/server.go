package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Limits towards clients. Streams may be silent for as long as they like, so only heads and unused connections have
// time limits; MaxConnections bounds the rest.
const (
	readHeaderTimeout = 15 * time.Second
	idleTimeout       = 620 * time.Second // what the SDKs' other hosts allow
	maxHeaderBytes    = 64 << 10
	maxStreams        = 2048 // an SDK opens up to 2000 at once
	streamWindow      = 4 << 20
	connWindow        = 16 << 20
	pingAfter         = 30 * time.Second
	pingTimeout       = 15 * time.Second
	lastWords         = time.Second // for answers to requests that a shutdown has cut
)

// ServeOptions say how Serve meets clients.
type ServeOptions struct {
	// TLS is what clients are met with; HTTP/2 is offered where NextProtos has h2. Nil means plain HTTP/1.1, and
	// HTTP/2 for clients that begin with it.
	TLS *tls.Config
	// Handler answers whatever net/http has to: HTTP/2, the hosts of Foreign and, with HTTP1Standard, everything. Nil means
	// the Proxy itself. It must give the Proxy what is not Foreign.
	Handler http.Handler
	// Foreign reports whether a Host header, as sent and with a port where it has one, names something else than a sandbox, such as
	// the API. A connection that asks for one stays with net/http from then on. Nil means that none does.
	Foreign func(host string) bool
	// Grace takes the place of Config.DrainTimeout where it is not 0.
	Grace time.Duration
}

// Serve answers on the listener until ctx ends, then closes it, lets open requests go on for a while, cuts the
// rest and closes the Proxy. It returns when all of that is over: nil after ctx has ended, else why the listener failed.
func (p *Proxy) Serve(ctx context.Context, l net.Listener, opt ServeOptions) error {
	bounded := &boundedListener{Listener: l, slots: make(chan struct{}, p.maxConnections), done: make(chan struct{}), open: &p.connections}
	if opt.Handler == nil {
		opt.Handler = p
	}
	srv := p.server(opt.Handler)
	opt.Grace = orDefault(opt.Grace, p.drainTimeout)
	if p.http1 == HTTP1Standard {
		return p.serveStandard(ctx, bounded, srv, opt)
	}
	s := &fastServer{
		proxy: p, listener: bounded, tls: opt.TLS, foreign: opt.Foreign, standard: srv, handOver: newHandOver(l.Addr()),
		grace: opt.Grace, stall: p.stallTimeout, open: make(map[*clientConn]struct{}),
	}
	return s.run(ctx)
}

// serveStandard leaves everything to net/http.
func (p *Proxy) serveStandard(ctx context.Context, l net.Listener, srv *http.Server, opt ServeOptions) error {
	addr := l.Addr()
	if opt.TLS != nil {
		l = tls.NewListener(l, opt.TLS)
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return serve(srv, l, addr) })
	group.Go(func() error {
		<-groupCtx.Done()
		p.shutdown(context.WithoutCancel(groupCtx), srv, opt.Grace)
		return nil
	})
	return group.Wait()
}

// Close cuts all open requests, upgraded connections included, refuses new ones and returns when none is left. It is for
// those who answer with a server of their own: after that server's Shutdown, before they wait for anything else.
func (p *Proxy) Close() {
	p.forwarder.guests.close(errShutdown)
	p.forwarder.guests.joined.Wait()
}

func serve(srv *http.Server, ln net.Listener, addr net.Addr) error {
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve sandbox traffic on %s: %w", addr, err)
	}
	return nil
}

func (p *Proxy) server(handler http.Handler) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           handler,
		Protocols:         &protocols,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(p.logger.Handler(), slog.LevelDebug),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          maxStreams,
			MaxReceiveBufferPerStream:     streamWindow,
			MaxReceiveBufferPerConnection: connWindow,
			SendPingTimeout:               pingAfter,
			PingTimeout:                   pingTimeout,
		},
	}
}

func (p *Proxy) shutdown(ctx context.Context, srv *http.Server, grace time.Duration) {
	drain, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	_ = srv.Shutdown(drain) // what it leaves open is cut next
	p.forwarder.guests.close(errShutdown)
	last, cancelLast := context.WithTimeout(ctx, lastWords)
	defer cancelLast()
	_ = srv.Shutdown(last)
	_ = srv.Close()
	p.Close()
}

// boundedListener accepts no more connections than it has slots.
type boundedListener struct {
	net.Listener
	slots chan struct{}
	done  chan struct{}
	once  sync.Once
	open  *atomic.Int64
}

// Accept waits for a slot, then for a connection.
func (l *boundedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	l.open.Add(1)
	return &boundedConn{Conn: conn, release: sync.OnceFunc(func() { l.open.Add(-1); <-l.slots })}, nil
}

// Close ends Accept.
func (l *boundedListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

// boundedConn gives its slot back when it is closed.
type boundedConn struct {
	net.Conn
	release func()
}

// Close closes the connection and gives the slot back.
func (c *boundedConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}

// CloseWrite lets a server that answers early make sure that its answer is read.
func (c *boundedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
