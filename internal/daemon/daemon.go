// Package daemon puts the parts together: it builds the roles of this process, starts them, and stops them in order.
//
// It owns the data directory, the listeners, the identity of a machine that joined, and the adapters between packages that
// do not know each other, and decides nothing about sandboxes. Run owns every goroutine; a part that ends by itself ends
// the whole.
//
// A process has one or more roles, each a struct with its parts: serverRole (server.go), nodeRole (node.go), proxyRole
// (proxy.go). Roles in one process call each other directly. Beside them there is, with a server, clusterRole (cluster.go):
// the port that members come in by; and without one memberRole (member.go): the link to the server, and the certificate.
// A node without a server answers its own socket by itself (alone.go).
//
// Start: lock, storage, store, server, link, node, proxy, listeners; then loops, in that order; then, with a server and a
// node, first template and a sandbox that runs a command; ready.
// Stop: listeners (requests under way finish), loops, proxy, node, link, server, store, lock. Sandboxes go on
// running, and their storage stays mounted.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/telemetry"
)

// Options are what the caller of Run brings besides the settings.
type Options struct {
	Version string
	// Roles are the parts that run.
	Roles Roles
	// LogTo takes the log.
	LogTo io.Writer
	// Notify is told how the start goes on, by one goroutine at a time; nil tells nobody.
	Notify func(Event)
	// Reload reads the settings again, for SIGHUP; nil ignores that signal.
	Reload func() (*config.Config, error)
}

// Roles says which parts run in a process. Without Server it is a machine that joined a cluster, as a node or a proxy.
type Roles struct{ Server, Node, Proxy bool }

// joined returns what a machine without a server is.
func (r Roles) joined() (role sandbox.Role, ok bool) {
	switch {
	case r.Server:
		return "", false
	case r.Node:
		return sandbox.RoleNode, true
	}
	return sandbox.RoleProxy, true
}

// Check refuses settings that the roles have no use for, and that would be taken to work. Errors: ErrInvalid, with the setting.
func (r Roles) Check(cfg *config.Config) error {
	role, joined := r.joined()
	switch {
	case joined && len(cfg.Proxies) > 0:
		return sandbox.Invalidf("proxies %q: a server dials proxies, this is a %s; set it on the server and leave it out here", cfg.Proxies, role)
	case cfg.LinkAddr != "" && role != sandbox.RoleProxy:
		return sandbox.Invalidf("link-addr %q: only `cloister proxy` waits for its servers; leave it out here, and list the proxies' URLs in proxies of the server", cfg.LinkAddr)
	}
	return nil
}

// daemon is one running process.
type daemon struct {
	cfg     *config.Config
	roles   Roles
	version string
	log     *slog.Logger
	notify  func(Event)
	reload  func() (*config.Config, error)
	begun   time.Time
	ready   atomic.Bool
	// ending means that no new requests are wanted.
	ending  atomic.Bool
	metrics *prometheus.Registry
	held    *lock

	// What is not in this process is nil.
	server  *serverRole
	cluster *clusterRole
	member  *memberRole
	node    *nodeRole
	proxy   *proxyRole
	fronts  []*front
	// admin is what the unix socket answers, traffic what it answers for sandboxes.
	admin, traffic http.Handler
	// closers undo what was opened, last first.
	closers []func() error
}

// Run runs the roles on this machine until ctx ends. Sandboxes outlive it. Errors: ErrConflict when the data directory
// is in use, or is one of another role.
func Run(ctx context.Context, cfg *config.Config, opt Options) (err error) {
	if err := opt.Roles.Check(cfg); err != nil {
		return err
	}
	held, err := acquire(ctx, cfg.DataDir, opt.Version)
	if err != nil {
		return err
	}
	defer held.release()
	d, err := newDaemon(cfg, opt)
	if err != nil {
		return err
	}
	d.held = held
	defer func() { err = errors.Join(err, d.close()) }()
	stopTracing, err := telemetry.StartTracing(ctx, telemetry.Tracing{Endpoint: cfg.OTLPEndpoint, Version: opt.Version})
	if err != nil {
		return fmt.Errorf("start tracing: %w", err)
	}
	d.closers = append(d.closers, func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownGrace)
		defer cancel()
		return stopTracing(ctx)
	})
	if err := d.build(ctx); err != nil {
		return err
	}
	return d.serve(ctx)
}

func newDaemon(cfg *config.Config, opt Options) (*daemon, error) {
	log, err := telemetry.NewLogger(telemetry.Logging{Writer: opt.LogTo, Level: cfg.LogLevel, Format: cfg.LogFormat})
	if err != nil {
		return nil, err
	}
	if opt.Notify == nil {
		opt.Notify = func(Event) {}
	}
	return &daemon{
		cfg: cfg, roles: opt.Roles, version: opt.Version, log: log, notify: opt.Notify, reload: opt.Reload, begun: time.Now(), metrics: telemetry.NewRegistry(),
	}, nil
}

// build makes every part, so that a wrong setting or a taken port is told before anything runs.
func (d *daemon) build(ctx context.Context) error {
	d.notify(Event{Step: "starting", Fraction: 0})
	for _, part := range []struct {
		wanted bool
		build  func(context.Context) error
	}{
		{d.roles.Node, d.openStorage},
		{d.roles.Server, d.buildServer},
		{!d.roles.Server, d.buildMember},
		{d.roles.Server, d.buildCluster},
		{d.roles.Node, d.buildNode},
		{d.roles.Proxy, d.buildProxy},
		{true, d.buildFronts},
	} {
		if !part.wanted {
			continue
		}
		if err := part.build(ctx); err != nil {
			return err
		}
	}
	return nil
}

// serve runs every part until ctx ends or one of them fails.
func (d *daemon) serve(ctx context.Context) error {
	// Loops outlive the listeners, so that requests under way can finish.
	loopCtx, stopLoops := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoops()
	loops, loopCtx := errgroup.WithContext(loopCtx)
	if err := d.startLoops(loopCtx, loops); err != nil {
		stopLoops()
		return errors.Join(err, loops.Wait())
	}
	frontCtx, stopFronts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopFronts()
	defer context.AfterFunc(ctx, func() { d.depart(loopCtx); d.linger(frontCtx); stopFronts() })()
	fronts, frontCtx := errgroup.WithContext(frontCtx)
	context.AfterFunc(loopCtx, stopFronts)
	err := d.awaitNode(frontCtx)
	if err == nil {
		for _, f := range d.fronts {
			fronts.Go(func() error { return f.run(frontCtx, d.cfg.ShutdownGrace) })
		}
		fronts.Go(func() error { return d.bootstrap(frontCtx) })
		err = fronts.Wait()
	}
	d.log.InfoContext(ctx, "stopping; sandboxes go on running")
	stopLoops()
	if loopErr := loops.Wait(); !errors.Is(loopErr, context.Canceled) {
		err = errors.Join(err, loopErr)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // the caller asked for the end
	}
	return err
}

// startLoops starts what runs besides the listeners.
func (d *daemon) startLoops(ctx context.Context, loops *errgroup.Group) error {
	if d.server != nil {
		d.server.start(ctx, loops)
		d.cluster.start(ctx, loops)
		loops.Go(func() error { d.followReloads(ctx); return nil })
	}
	if d.node != nil {
		if err := d.node.start(ctx, loops); err != nil {
			return err
		}
		loops.Go(func() error { return d.followRoom(ctx) })
	}
	if d.member != nil {
		d.member.start(ctx, loops)
	}
	if d.proxy != nil {
		d.proxy.start(ctx, loops)
	}
	return nil
}

// awaitNode waits, where server and node are in one process, until the server knows what runs: clients wait in the
// listeners' queues. A node whose server is elsewhere answers for itself meanwhile.
func (d *daemon) awaitNode(ctx context.Context) error {
	if d.server == nil || d.node == nil {
		return nil
	}
	return d.node.uplink.wait(ctx)
}

// close undoes what build opened, in reverse.
func (d *daemon) close() error {
	var errs []error
	for _, undo := range slices.Backward(d.closers) {
		errs = append(errs, undo())
	}
	return errors.Join(errs...)
}

func (d *daemon) path(elem ...string) string {
	return filepath.Join(append([]string{d.cfg.DataDir}, elem...)...)
}
