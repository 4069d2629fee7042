package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// headTimeout bounds how long a client may take to send a request's head; bodies and answers may take any time.
const headTimeout = 30 * time.Second

// idleTimeout is how long a connection without a request is kept: longer than clients keep theirs, so that it is they who
// close it, and no request meets a closing connection.
const idleTimeout = 620 * time.Second

// front is one listener with what answers on it.
type front struct {
	name     string
	listener net.Listener
	server   *http.Server
	// own answers in the server's place, as run does; nil where the server answers.
	own func(ctx context.Context, grace time.Duration) error
}

// listenTCP opens a TCP listener; a taken port is told with the setting to change.
func listenTCP(ctx context.Context, setting, addr string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w; --%s chooses another address, `cloister doctor` says who holds it", addr, err, setting)
	}
	return l, nil
}

// listenUnix opens the local socket, for root only. The caller holds the data directory, so a socket that is there is a leftover.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("protect socket: %w", err)
	}
	return l, nil
}

// newFront prepares a server for HTTP/1.1 and HTTP/2, the latter also without TLS.
func newFront(name string, l net.Listener, h http.Handler, tlsConfig *tls.Config) *front {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &front{name: name, listener: l, server: &http.Server{
		Handler: h, Protocols: &protocols, TLSConfig: tlsConfig,
		ReadHeaderTimeout: headTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 256 << 10,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: 2048, MaxReceiveBufferPerStream: 4 << 20, MaxReceiveBufferPerConnection: 16 << 20,
			SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second,
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // handlers log what matters; the rest is clients' noise
	}}
}

// run serves until ctx ends, then finishes the requests under way, for at most grace.
func (f *front) run(ctx context.Context, grace time.Duration) error {
	if f.own != nil {
		return f.own(ctx, grace)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() {
		<-ctx.Done()
		stopCtx, stop := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer stop()
		if f.server.Shutdown(stopCtx) != nil {
			_ = f.server.Close() // long streams do not end by themselves
		}
	})
	serve := func() error { return f.server.Serve(f.listener) }
	if f.server.TLSConfig != nil {
		serve = func() error { return f.server.ServeTLS(f.listener, "", "") }
	}
	if err := serve(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", f.name, err)
	}
	return nil
}
