package routes

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// server is whom the table is from: the generated client of proxy.v1.
type server interface {
	Watch(ctx context.Context, req *proxyv1.WatchRequest) (*connect.ServerStreamForClient[proxyv1.WatchResponse], error)
	Lookup(ctx context.Context, req *proxyv1.LookupRequest) (*proxyv1.LookupResponse, error)
	Wake(ctx context.Context, req *proxyv1.WakeRequest) (*proxyv1.WakeResponse, error)
	Sign(ctx context.Context, req *proxyv1.SignRequest) (*proxyv1.SignResponse, error)
	Report(ctx context.Context, req *proxyv1.ReportRequest) (*proxyv1.ReportResponse, error)
}

// traffic is the proxy that the table is for. None of its methods may block.
type traffic interface {
	// Changed is told of each route that is not what it was, ended and forgotten ones included.
	Changed(r sandbox.Route)
	// NodeDown is told of each node that does not answer any more.
	NodeDown(id sandbox.NodeID)
	// Activities returns every sandbox that was used after since, and for the zero time every one that is remembered.
	// What was used up to since needs to be remembered no longer.
	Activities(since time.Time) []sandbox.Activity
}

// Config is what a Table is made of.
type Config struct {
	// Server is the client of proxy.v1 over the link to a server. While no server is reached its calls should fail at
	// once, with ErrUnavailable or a Connect error of that code.
	Server server
	// Logger may be nil, for silence.
	Logger *slog.Logger
	// Registerer may be nil, for no metrics.
	Registerer prometheus.Registerer
	// LookupsPerSecond bounds how often the server is asked for ids that the table lacks, which anybody can make up; 0
	// means 100.
	LookupsPerSecond int
	// CallTimeout bounds each Lookup, Sign and Report; 0 means 5 s.
	CallTimeout time.Duration
	// ReportEvery is the time between two reports of activity; 0 means 2 s. The server may ask for them more often.
	ReportEvery time.Duration
	// Self says what the proxy is, for the list of them; nil means that it is in none.
	Self func() Self
}

// Self is what a proxy says of itself.
type Self struct {
	Version string
	// Address is the URL by which clients reach it.
	Address string
	Started time.Time
	// Connections are clients', Requests those that are open on them.
	Connections, Requests int
}

func (cfg Config) withDefaults() Config {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.LookupsPerSecond <= 0 {
		cfg.LookupsPerSecond = 100
	}
	if cfg.CallTimeout <= 0 {
		cfg.CallTimeout = 5 * time.Second
	}
	if cfg.ReportEvery <= 0 {
		cfg.ReportEvery = 2 * time.Second
	}
	return cfg
}

// Table says where sandboxes are and how nodes are reached.
type Table struct {
	server  server
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	lookups *rate.Limiter

	mu     sync.RWMutex
	routes map[sandbox.ID]sandbox.Route
	nodes  map[sandbox.NodeID]sandbox.NodeRoute
	// kept are sandboxes that a whole table did not name, of nodes of which the server did not know what runs there.
	kept map[sandbox.ID]struct{}
	// name and version are what the next Watch resumes from.
	name    string
	version int64
	synced  bool
	// staleSince is since when no server has been followed; zero while one is.
	staleSince time.Time
	waiting    map[sandbox.ID]*waiters
	asking     map[sandbox.ID]*question
	// leaving hands the reporter where it is to say how the telling went; prompt has it report at once.
	leaving chan chan<- error
	prompt  chan struct{}
}

// New returns an empty Table; Run fills it. Errors: ErrInvalid.
func New(cfg Config) (*Table, error) {
	if cfg.Server == nil {
		return nil, sandbox.Invalidf("routes: a server is needed")
	}
	cfg = cfg.withDefaults()
	t := &Table{
		server: cfg.Server, cfg: cfg, log: cfg.Logger,
		lookups: rate.NewLimiter(rate.Limit(cfg.LookupsPerSecond), cfg.LookupsPerSecond),
		routes:  make(map[sandbox.ID]sandbox.Route), nodes: make(map[sandbox.NodeID]sandbox.NodeRoute),
		kept:       make(map[sandbox.ID]struct{}),
		staleSince: time.Now(),
		waiting:    make(map[sandbox.ID]*waiters), asking: make(map[sandbox.ID]*question),
		leaving: make(chan chan<- error), prompt: make(chan struct{}, 1),
	}
	var err error
	t.metrics, err = newMetrics(cfg.Registerer, t)
	return t, err
}

// Run follows the server and reports what sandboxes are used for until ctx ends; it returns nil when its goroutines have
// ended. What it cannot do now it goes on trying.
func (t *Table) Run(ctx context.Context, tr traffic) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { t.follow(ctx, tr); return nil })
	g.Go(func() error { t.report(ctx, tr); return nil })
	return g.Wait()
}

// Leave tells the server that the proxy takes no new requests, and returns when it is registered no more. What sandboxes are
// used for is reported until Run ends. Errors: ErrUnavailable where no server hears it; ctx's.
func (t *Table) Leave(ctx context.Context) error {
	told := make(chan error, 1)
	select {
	case t.leaving <- told:
	case <-ctx.Done():
		return fmt.Errorf("leave the fleet: %w", ctx.Err())
	}
	select {
	case err := <-told:
		return err
	case <-ctx.Done():
		return fmt.Errorf("leave the fleet: %w", ctx.Err())
	}
}

// Ready reports whether the table has been whole once.
func (t *Table) Ready() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.synced
}

// StaleSince is since when no server has been followed, so that the table may be behind; zero while one is.
func (t *Table) StaleSince() time.Time {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.staleSince
}

// Node says how a node is reached; false: it is unknown.
func (t *Table) Node(id sandbox.NodeID) (sandbox.NodeRoute, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n, ok := t.nodes[id]
	return n, ok
}
