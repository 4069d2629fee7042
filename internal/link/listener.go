package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxConns bounds the connections that a listener holds, handshakes included. What comes beyond it is closed at once.
const maxConns = 16384

// Identify names the member at the other end of a TLS connection, whose certificate was verified. Errors: ErrDenied for who
// is no member any more.
type Identify func(tls.ConnectionState) (sandbox.Member, error)

// ListenerConfig is what a Listener needs.
type ListenerConfig struct {
	Node sandbox.NodeID
	// TLS demands and verifies the other end's certificate.
	TLS      *tls.Config
	Identify Identify
	// Handlers take the streams; calls are not taken here.
	Handlers Handlers
	Logger   *slog.Logger
}

// Listener takes streams that other members open to a node directly.
type Listener struct {
	cfg    ListenerConfig
	accept *acceptor

	mu   sync.Mutex
	open map[net.Conn]sandbox.Member
}

// NewListener returns a listener that Serve runs.
func NewListener(cfg ListenerConfig) *Listener {
	cfg.Handlers.RPC = nil
	return &Listener{cfg: cfg, accept: newAcceptor(cfg.Handlers), open: make(map[net.Conn]sandbox.Member)}
}

// Drop closes the connections of members that are gone.
func (l *Listener) Drop(gone func(sandbox.Member) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c, m := range l.open {
		if gone(m) {
			_ = c.Close()
		}
	}
}

// enter notes whose a connection is until leave is called.
func (l *Listener) enter(c net.Conn, m sandbox.Member) (leave func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[c] = m
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.open, c)
	}
}

// Serve takes connections of ln until ctx ends, then closes all of them and returns when they have ended.
func (l *Listener) Serve(ctx context.Context, ln net.Listener) error {
	return serveConns(ctx, ln, l.cfg.Logger, l.take)
}

func (l *Listener) take(ctx context.Context, raw net.Conn) error {
	c := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(hi *tls.ClientHelloInfo) (*tls.Config, error) {
		return settings(hi, l.cfg.TLS, tls.RequireAndVerifyClientCert, protoDirect)
	}})
	if err := handshake(ctx, c); err != nil {
		return err
	}
	from, err := l.cfg.Identify(c.ConnectionState())
	if err != nil {
		refuse(c, err)
		return err
	}
	defer l.enter(raw, from)()
	h, err := takeHead(c)
	if err != nil {
		return err
	}
	if err := l.allows(from, &h); err != nil {
		refuse(c, err)
		return err
	}
	l.accept.serve(ctx, c, from, h, func(net.Conn) net.Conn { return direct{c} })
	return nil
}

func (l *Listener) allows(from sandbox.Member, h *Head) error {
	if h.From != (sandbox.Member{}) {
		return sandbox.Deniedf("%s may not open streams for others", from)
	}
	if h.Node != l.cfg.Node {
		return sandbox.NotFoundf("a stream to node %.20q reached node %s", string(h.Node), l.cfg.Node)
	}
	return MayOpen(from.Role, h.Kind)
}

// serveConns runs take for each connection until ctx ends, and returns when all have ended. It closes the listener.
func serveConns(ctx context.Context, ln net.Listener, log *slog.Logger, take func(context.Context, net.Conn) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var taken sync.WaitGroup
	defer taken.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	slots := make(chan struct{}, maxConns)
	for {
		c, err := acceptConn(ctx, ln)
		if err != nil {
			if ctx.Err() != nil {
				return nil // closed because it was told to end
			}
			return fmt.Errorf("accept connection: %w", err)
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		taken.Go(func() {
			defer func() { <-slots }()
			defer func() { _ = c.Close() }()
			defer context.AfterFunc(ctx, func() { abort(c) })()
			if err := take(ctx, c); err != nil && ctx.Err() == nil {
				log.DebugContext(ctx, "connection refused", slog.String("remote", c.RemoteAddr().String()), slog.Any("err", err))
			}
		})
	}
}

// acceptConn takes the next connection; where the process has no descriptors left it waits and tries again.
func acceptConn(ctx context.Context, ln net.Listener) (net.Conn, error) {
	for {
		c, err := ln.Accept()
		if err == nil {
			tune(c)
			return c, nil
		}
		var passing interface{ Temporary() bool } // net.Error's own is marked as out of use; accept still sets it
		if !errors.As(err, &passing) || !passing.Temporary() || !pause(ctx, 50*time.Millisecond) {
			return nil, err
		}
	}
}

// pause waits; false where ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func handshake(ctx context.Context, c *tls.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	return nil
}
