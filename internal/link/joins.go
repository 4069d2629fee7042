package link

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxJoins bounds the connections of who has no certificate yet.
	maxJoins = 256
	idleJoin = 30 * time.Second
)

// joins serves HTTP to those who are not members yet. As a listener it hands their connections to an HTTP server.
type joins struct {
	server *http.Server
	conns  chan net.Conn
	done   chan struct{}
	slots  chan struct{}

	mu   sync.Mutex
	open map[net.Conn]chan struct{}
}

func newJoins(h http.Handler) *joins {
	j := &joins{conns: make(chan net.Conn), done: make(chan struct{}), slots: make(chan struct{}, maxJoins), open: make(map[net.Conn]chan struct{})}
	j.server = &http.Server{
		Handler: h, ReadHeaderTimeout: headTimeout, ReadTimeout: idleJoin, IdleTimeout: idleJoin, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		ConnState: func(c net.Conn, s http.ConnState) {
			if s == http.StateClosed || s == http.StateHijacked {
				j.closed(c)
			}
		},
	}
	return j
}

// serve runs the HTTP server until ctx ends.
func (j *joins) serve(ctx context.Context) {
	defer context.AfterFunc(ctx, func() { close(j.done); _ = j.server.Close() })()
	_ = j.server.Serve(j) // it ends with ctx
}

// take has a connection served and returns when it has ended.
func (j *joins) take(ctx context.Context, c *tls.Conn) error {
	select {
	case j.slots <- struct{}{}:
	default:
		return sandbox.Exhaustedf("%d connections of who wants to join are open", maxJoins)
	}
	defer func() { <-j.slots }()
	closed := make(chan struct{})
	j.mu.Lock()
	j.open[c] = closed
	j.mu.Unlock()
	select {
	case j.conns <- c:
	case <-ctx.Done():
		j.closed(c)
		return nil
	}
	<-closed
	return nil
}

func (j *joins) closed(c net.Conn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if closed := j.open[c]; closed != nil {
		close(closed)
		delete(j.open, c)
	}
}

// Accept returns the next connection.
func (j *joins) Accept() (net.Conn, error) {
	select {
	case c := <-j.conns:
		return c, nil
	case <-j.done:
		return nil, errors.Join(net.ErrClosed, http.ErrServerClosed)
	}
}

// Close does nothing: serve's context ends the server.
func (j *joins) Close() error { return nil }

// Addr is of no interest to anybody.
func (j *joins) Addr() net.Addr { return &net.TCPAddr{} }
