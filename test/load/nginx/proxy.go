package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime/pprof"

	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const guestID = sandbox.ID("i0node0abcdefghijklm")

// guest is the one sandbox of these measurements: the backend.
type guest struct{ addr string }

// Route says that it runs.
func (guest) Route(_ context.Context, id sandbox.ID) (sandbox.Route, error) {
	return sandbox.Route{ID: id, State: sandbox.StateRunning, Generation: 1}, nil
}

// Await waits for news, of which there is none.
func (guest) Await(ctx context.Context, _ sandbox.ID, _ sandbox.Route) (sandbox.Route, error) {
	<-ctx.Done()
	return sandbox.Route{}, ctx.Err()
}

// Wake has nothing to do.
func (g guest) Wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	return g.Route(ctx, id)
}

// DialGuest connects to the backend.
func (g guest) DialGuest(ctx context.Context, _ sandbox.NodeID, _ sandbox.ID, _ uint16) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", g.addr)
}

// beProxy serves by a data path until it is told to end.
func beProxy(ctx context.Context, o options, path, listen, backend string) error {
	g := guest{addr: backend}
	p, err := proxy.New(proxy.Config{Router: g, Dialer: g, HTTP1: path})
	if err != nil {
		return fmt.Errorf("build the proxy: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if o.profile != "" && path == proxy.HTTP1Fast {
		f, err := os.Create(o.profile)
		if err != nil {
			return fmt.Errorf("create profile: %w", err)
		}
		defer func() { _ = f.Close() }()
		if err := pprof.StartCPUProfile(f); err != nil {
			return fmt.Errorf("profile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}
	return p.Serve(ctx, l, proxy.ServeOptions{})
}
