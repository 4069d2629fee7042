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
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// stallTimeout is how long a client may take nothing of what is sent to it.
	stallTimeout = 5 * time.Minute
	acceptPause  = 20 * time.Millisecond
)

// fastServer answers HTTP/1.1 on one listener by the fast path, and gives net/http all connections that speak HTTP/2 or
// that ask for something else than sandboxes.
type fastServer struct {
	proxy    *Proxy
	listener net.Listener
	tls      *tls.Config
	foreign  func(host string) bool
	standard *http.Server
	handOver *handOver
	grace    time.Duration
	stall    time.Duration

	draining atomic.Bool
	clients  sync.WaitGroup

	mu   sync.Mutex
	open map[*clientConn]struct{}
}

// run serves until ctx ends, and then for as long as a shutdown takes.
func (s *fastServer) run(ctx context.Context) error {
	s.standard.ConnContext = withTLS
	s.standard.Handler = knowingTLS(s.standard.Handler)
	group, groupCtx := errgroup.WithContext(ctx)
	accepting := make(chan struct{})
	group.Go(func() error {
		defer close(accepting)
		return s.accept(context.WithoutCancel(ctx))
	})
	group.Go(func() error { return serve(s.standard, s.handOver, s.listener.Addr()) })
	group.Go(func() error {
		<-groupCtx.Done()
		s.draining.Store(true)
		_ = s.listener.Close()
		<-accepting
		s.shutdown(context.WithoutCancel(ctx))
		return nil
	})
	return group.Wait()
}

func (s *fastServer) accept(ctx context.Context) error {
	for {
		conn, err := s.listener.Accept()
		var temporary interface{ Temporary() bool }
		switch {
		case err == nil:
			s.clients.Go(func() { s.serveConn(ctx, conn) })
		case errors.Is(err, net.ErrClosed):
			return s.closedBy(err)
		case errors.As(err, &temporary) && temporary.Temporary(): // no descriptors, say
			s.proxy.logger.WarnContext(ctx, "accept client", slog.Any("err", err))
			<-time.After(acceptPause)
		default:
			return fmt.Errorf("serve sandbox traffic on %s: %w", s.listener.Addr(), err)
		}
	}
}

// shutdown lets requests end, cuts those that take too long, and returns when nothing of the server runs any more.
func (s *fastServer) shutdown(ctx context.Context) {
	s.closeClients(clientIdle)
	over := make(chan struct{})
	go func() {
		s.clients.Wait()
		close(over)
	}()
	s.wait(ctx, over, s.grace)
	s.proxy.forwarder.guests.close(errShutdown)
	s.wait(ctx, over, lastWords)
	_ = s.standard.Close()
	s.closeClients(clientBusy)
	<-over
	s.proxy.Close()
}

// wait waits until both data paths are through, but not for longer than d.
func (s *fastServer) wait(ctx context.Context, over <-chan struct{}, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	_ = s.standard.Shutdown(ctx) // what it leaves open is cut next
	select {
	case <-over:
	case <-ctx.Done():
	}
}

// closeClients closes the connections in a state, or, for clientBusy, all.
func (s *fastServer) closeClients(state int32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		if c.state.CompareAndSwap(clientIdle, clientClosing) || state == clientBusy {
			_ = c.conn.SetDeadline(time.Unix(1, 0)) // its own goroutine closes it
		}
	}
}

func (s *fastServer) isForeign(host []byte) bool {
	return s.foreign != nil && s.foreign(string(host))
}

// serveConn serves one connection.
func (s *fastServer) serveConn(ctx context.Context, conn net.Conn) {
	c := &clientConn{server: s, conn: conn, remote: conn.RemoteAddr().String(), buf: make([]byte, clientBuffer)}
	if bounded, ok := conn.(*boundedConn); ok {
		c.conn = bounded.Conn
	}
	if host, _, err := net.SplitHostPort(c.remote); err == nil {
		c.host = []byte(host)
	}
	c.tcp = plainTCP(c.conn)
	limitStall(c.tcp, s.stall)
	s.enter(c)
	err := errHandOver
	if s.tls == nil || s.handshake(ctx, c, conn) {
		err = c.serve(ctx)
	}
	s.leave(c)
	if !errors.Is(err, errHandOver) || !s.give(c, conn) {
		_ = c.conn.Close()
		_ = conn.Close()
	}
}

// closedBy tells a listener that the shutdown has closed from one that somebody else has.
func (s *fastServer) closedBy(err error) error {
	if s.draining.Load() {
		return nil
	}
	return fmt.Errorf("serve sandbox traffic on %s: %w", s.listener.Addr(), err)
}

func (s *fastServer) enter(c *clientConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[c] = struct{}{}
}

func (s *fastServer) leave(c *clientConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

// handshake puts TLS on a connection and reports whether HTTP/1.1 was agreed on.
func (s *fastServer) handshake(ctx context.Context, c *clientConn, conn net.Conn) bool {
	secured := tls.Server(conn, s.tls)
	c.conn, c.tcp, c.secure = secured, nil, true
	ctx, cancel := context.WithTimeout(ctx, readHeaderTimeout)
	defer cancel()
	if secured.HandshakeContext(ctx) != nil {
		return true // reading from it fails the same way
	}
	return secured.ConnectionState().NegotiatedProtocol != "h2"
}

// give hands a connection over to net/http, with what has been read from it. It is not ok once the server ends.
func (s *fastServer) give(c *clientConn, conn net.Conn) bool {
	c.setDeadline(time.Time{})
	rest := c.buf[c.next:c.end]
	if !c.secure {
		return s.handOver.give(&replayed{Conn: conn, rest: rest})
	}
	secured, ok := c.conn.(*tls.Conn)
	if !ok || secured.ConnectionState().NegotiatedProtocol == "h2" {
		return s.handOver.give(c.conn)
	}
	return s.handOver.give(&replayed{Conn: secured, rest: rest, tls: secured})
}

// handOver is the listener that net/http gets its connections from.
type handOver struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	addr  net.Addr
}

func newHandOver(addr net.Addr) *handOver {
	return &handOver{conns: make(chan net.Conn), done: make(chan struct{}), addr: addr}
}

func (h *handOver) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.done:
		return false
	}
}

// Accept waits for a connection.
func (h *handOver) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *handOver) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr returns the address that clients know.
func (h *handOver) Addr() net.Addr { return h.addr }

// replayed is a connection of which something has been read already.
type replayed struct {
	net.Conn
	rest []byte
	tls  *tls.Conn // nil without
}

// Read returns what has been read first.
func (r *replayed) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return r.Conn.Read(p)
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// CloseWrite ends the sending direction.
func (r *replayed) CloseWrite() error {
	if half, ok := r.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return r.Close()
}

type tlsKey struct{}

// withTLS remembers what net/http cannot see: that a connection which it was given is encrypted.
func withTLS(ctx context.Context, conn net.Conn) context.Context {
	if r, ok := conn.(*replayed); ok && r.tls != nil {
		return context.WithValue(ctx, tlsKey{}, r.tls)
	}
	return ctx
}

func knowingTLS(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if conn, ok := r.Context().Value(tlsKey{}).(*tls.Conn); ok && r.TLS == nil {
			state := conn.ConnectionState()
			r.TLS = &state
		}
		next.ServeHTTP(w, r)
	})
}

// limitStall has the kernel end a connection whose peer takes nothing for so long.
func limitStall(c *net.TCPConn, d time.Duration) {
	const userTimeout = 0x12 // TCP_USER_TIMEOUT
	if c == nil {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return // it is closed
	}
	_ = raw.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, userTimeout, int(d.Milliseconds())) // without it a stalled client only costs memory
	})
}
