// Package daemon puts the parts together: it builds the roles of this process, starts them, and stops them in order.
//
// It owns the data directory, the listeners and the adapters between packages that do not know each other, and decides
// nothing about sandboxes. Run owns every goroutine; a part that ends by itself ends the whole.
//
// Start: lock, storage, store, node, server, listeners, loops, first template, a sandbox that runs a command, ready.
// Stop: listeners (requests under way finish), loops, node, server, store, lock. Sandboxes go on
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
	"github.com/cloister-dev/cloister/internal/telemetry"
)

// Options are what the caller of Run brings besides the settings.
type Options struct {
	Version string
	// LogTo takes the log.
	LogTo io.Writer
	// Notify is told how the start goes on, by one goroutine at a time; nil tells nobody.
	Notify func(Event)
	// Reload reads the settings again, for SIGHUP; nil ignores that signal.
	Reload func() (*config.Config, error)
}

// daemon is one running `cloister up`.
type daemon struct {
	cfg     *config.Config
	version string
	log     *slog.Logger
	notify  func(Event)
	reload  func() (*config.Config, error)
	begun   time.Time
	ready   atomic.Bool
	metrics *prometheus.Registry
	held    *lock

	server *serverRole
	node   *nodeRole
	fronts []*front
	// closers undo what was opened, last first.
	closers []func() error
}

// Run runs every role on this machine until ctx ends. Sandboxes outlive it. Errors: ErrConflict when the data directory
// is in use.
func Run(ctx context.Context, cfg *config.Config, opt Options) (err error) {
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
		cfg: cfg, version: opt.Version, log: log, notify: opt.Notify, reload: opt.Reload, begun: time.Now(), metrics: telemetry.NewRegistry(),
	}, nil
}

// build makes every part, so that a wrong setting or a taken port is told before anything runs.
func (d *daemon) build(ctx context.Context) error {
	d.notify(Event{Step: "starting", Fraction: 0})
	if err := d.openStorage(ctx); err != nil {
		return err
	}
	if err := d.buildServer(ctx); err != nil {
		return err
	}
	if err := d.buildNode(ctx); err != nil {
		return err
	}
	return d.buildFronts(ctx)
}

// serve runs every part until ctx ends or one of them fails.
func (d *daemon) serve(ctx context.Context) error {
	// Loops outlive the listeners, so that requests under way can finish.
	loopCtx, stopLoops := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoops()
	loops, loopCtx := errgroup.WithContext(loopCtx)
	d.server.start(loopCtx, loops)
	if err := d.node.start(loopCtx, loops); err != nil {
		stopLoops()
		return errors.Join(err, loops.Wait())
	}
	loops.Go(func() error { return d.followRoom(loopCtx) })
	loops.Go(func() error { d.followReloads(loopCtx); return nil })
	frontCtx, stopFronts := context.WithCancel(ctx)
	defer stopFronts()
	fronts, frontCtx := errgroup.WithContext(frontCtx)
	context.AfterFunc(loopCtx, stopFronts)
	// Clients wait in the listeners' queues until the server knows what runs.
	err := d.node.uplink.wait(frontCtx)
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

// local joins the API and the proxy by path, for the unix socket: whoever may open it is admin.
func local(api, proxy http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/sandbox/", proxy)
	mux.Handle("/", api)
	return mux
}
