package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// BaseURL begins the URLs of calls and requests over links; the client decides where they go.
const BaseURL = "http://link"

// memberKey is the key of a request's opener in its context.
type memberKey struct{}

// MemberFrom tells who opened the stream that a request came over.
func MemberFrom(ctx context.Context) (sandbox.Member, bool) {
	m, ok := ctx.Value(memberKey{}).(sandbox.Member)
	return m, ok
}

// WithMember returns a context in which MemberFrom finds m: for calls within one process, and for tests.
func WithMember(ctx context.Context, m sandbox.Member) context.Context {
	return context.WithValue(ctx, memberKey{}, m)
}

// Limits of HTTP on streams.
const (
	maxHeaderBytes = 64 << 10
	idleHTTP       = 90 * time.Second
	// maxCalls is how many calls one connection carries at once; more open another.
	maxCalls = 1000
	// receiveWindow is how much of one call's body may be under way, in bytes.
	receiveWindow = 1 << 20
)

func protocols(multiplexed bool) *http.Protocols {
	var p http.Protocols
	p.SetHTTP1(!multiplexed)
	p.SetUnencryptedHTTP2(multiplexed)
	return &p
}

// httpEnd serves HTTP on single streams.
type httpEnd struct{ server *http.Server }

// newHTTPEnd returns nil where there is no handler.
func newHTTPEnd(h http.Handler, multiplexed bool) *httpEnd {
	if h == nil {
		return nil
	}
	return &httpEnd{server: &http.Server{
		Handler:           h,
		Protocols:         protocols(multiplexed),
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxCalls, MaxReceiveBufferPerStream: receiveWindow},
		ReadHeaderTimeout: idleHTTP,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // handlers log for themselves
		BaseContext: func(l net.Listener) context.Context {
			return l.(*oneConn).ctx //nolint:errcheck,forcetypeassert // serve passes nothing else
		},
	}}
}

// serve answers yes and then requests on the stream until it ends.
func (e *httpEnd) serve(ctx context.Context, c net.Conn, from sandbox.Member) {
	if accept(c) != nil {
		return
	}
	ctx, cancel := context.WithCancel(WithMember(ctx, from))
	defer cancel()
	l := &oneConn{ctx: ctx, closed: make(chan struct{})}
	l.conn = &told{Conn: c, closed: sync.OnceFunc(func() { close(l.closed) })}
	stop := context.AfterFunc(ctx, func() { _ = l.conn.Close() })
	defer stop()
	_ = e.server.Serve(l) // ends with the connection
}

// oneConn is a listener for the sake of one connection. Accept blocks until that one has ended.
type oneConn struct {
	ctx    context.Context //nolint:containedctx // BaseContext hands it to the requests
	conn   net.Conn
	given  bool
	closed chan struct{}
}

// Accept returns the connection once. Only the server's loop calls it.
func (l *oneConn) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return l.conn, nil
	}
	<-l.closed
	return nil, io.EOF
}

// Close does nothing: the connection ends by itself.
func (l *oneConn) Close() error { return nil }

// Addr is the connection's own end.
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// told is a connection that tells of its end.
type told struct {
	net.Conn

	closed func()
}

// Close closes it.
func (t *told) Close() error {
	defer t.closed()
	return t.Conn.Close()
}

// transport makes requests over streams. Whatever keeps an answer from coming is ErrUnavailable, also in the middle of a call.
type transport struct{ *http.Transport }

// RoundTrip makes a request.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.Transport.RoundTrip(r)
	if err != nil && r.Context().Err() == nil && !errors.Is(err, sandbox.ErrUnavailable) {
		err = fmt.Errorf("%w: %w", sandbox.ErrUnavailable, err)
	}
	return resp, err
}

// newTransport returns a transport whose connections are streams that open opens.
func newTransport(multiplexed bool, open func(ctx context.Context) (net.Conn, error)) transport {
	return transport{&http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return open(ctx) },
		Protocols:              protocols(multiplexed),
		HTTP2:                  &http.HTTP2Config{MaxReceiveBufferPerStream: receiveWindow},
		DisableCompression:     true,
		MaxIdleConnsPerHost:    4,
		IdleConnTimeout:        idleHTTP,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}}
}
