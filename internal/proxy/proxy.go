// Package proxy carries traffic into sandboxes: host name, headers or path -> sandbox -> node -> guest port.
//
// It owns the rules by which a request names its sandbox (target.go), the refusal of routes that belong to the control
// plane (internalroute.go), the answers that it gives in a guest's stead (failure.go) and the way of the bytes
// (forward.go and below for net/http's, h1server.go and its siblings for the fast one of HTTP/1.1). Deciding where a
// request goes (resolver) knows nothing of how it gets there. It must not decide anything about a sandbox's life, hold records, or
// trust what a guest or a client sends.
//
// A request to a sandbox that does not run but will waits for it (wait.go); one that met a sandbox on its way elsewhere is
// sent again where that is harmless (again.go).
//
// Everything is safe for concurrent use. Locks: guests.mu, waits.mu, exchange.mu, pool.mu, watch.mu and transit.mu, each
// before nothing else; no I/O that waits under any. Goroutines belong to Serve (the server's, and one for each client of the
// fast path), to http.Transport (two for each open connection to a guest) or to the request that started them.
package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// GuestAgentPort is where the agent inside each sandbox listens; requests that name no port go there.
const GuestAgentPort = 49983

// Defaults of Config.
const (
	defaultWaitTimeout           = 25 * time.Second
	defaultDialTimeout           = 10 * time.Second
	defaultDrainTimeout          = 10 * time.Second
	defaultMaxConnections        = 32768
	defaultMaxRequestsPerSandbox = 8192
)

// router finds sandboxes, and makes paused ones run. *control.Control and *routes.Table are routers.
type router interface {
	// Route returns what is known of a sandbox. ErrNotFound: no such sandbox; ErrUnavailable: nobody can tell now.
	Route(ctx context.Context, id sandbox.ID) (sandbox.Route, error)
	// Await returns what is known of a sandbox once that is news compared with seen. Errors: those of Route, and ctx's.
	Await(ctx context.Context, id sandbox.ID, seen sandbox.Route) (sandbox.Route, error)
	// Wake makes a sandbox run that is paused and may be resumed by traffic, and returns when it does. ErrNotFound: no such
	// sandbox; ErrConflict: traffic may not resume it; ErrExhausted: nothing has room for it; ErrUnavailable.
	Wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error)
}

// dialer reaches into sandboxes.
type dialer interface {
	// DialGuest connects to a TCP port inside a sandbox of a node. ErrNotFound: no such sandbox there; ErrConflict: it is
	// paused, or on its way there or back, or elsewhere; an error that is syscall.ECONNREFUSED: nothing listens on the port;
	// any other: the node cannot be reached. The connection is closed under its user when the sandbox ends or is paused.
	DialGuest(ctx context.Context, node sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error)
}

// signatures finds the sandbox whose access token made a signature.
type signatures interface {
	// SandboxBySignature returns the sandbox that a signed file URL belongs to, whether or not it has expired.
	// ErrNotFound: no running sandbox made it. op is "read" or "write"; expiration is empty when the URL has none.
	SandboxBySignature(ctx context.Context, path, op, user, signature, expiration string) (sandbox.ID, error)
}

// Config is what a Proxy is made of.
type Config struct {
	Router router
	Dialer dialer
	// Signatures may be nil: then a file URL that names no sandbox is refused.
	Signatures signatures
	// Domain is the domain below which sandboxes have host names, as in <port>-<id>.<domain>. Empty means that any
	// domain does. A port in it is ignored.
	Domain string
	// PublicHosts are the proxy's own host names, for which the headers E2b-Sandbox-Id and E2b-Sandbox-Port count, as
	// they do for localhost, IP addresses and sandbox.<anything>.
	PublicHosts []string
	// Logger may be nil, for silence.
	Logger *slog.Logger
	// Registerer may be nil, for no metrics.
	Registerer prometheus.Registerer
	// WaitTimeout bounds how long a request waits in all for a sandbox that is on its way from one state to another, or
	// that is woken for it; after it the answer is 503. 0 means 25 s.
	WaitTimeout time.Duration
	// DialTimeout bounds connecting to a guest; 0 means 10 s.
	DialTimeout time.Duration
	// DrainTimeout bounds how long Run lets open requests go on after its context has ended; 0 means 10 s.
	DrainTimeout time.Duration
	// MaxConnections bounds the client connections of each listener; more wait to be accepted. 0 means 32768.
	MaxConnections int
	// HTTP1 is the data path of HTTP/1.1; empty means HTTP1Fast.
	HTTP1 string
	// Ready reports whether GET /readyz, sent to none of the sandboxes, is answered with 200; nil means always.
	Ready func() bool
	// Trace begins a span for a request of HTTP1Fast, whose fields it may look up until it returns, and returns what ends it with the
	// answer's status, 0 where none was sent; nil traces nothing. What the standard path answers its caller traces.
	Trace func(ctx context.Context, method string, field func(name string) string) (spanned context.Context, end func(status int))
	// MaxRequestsPerSandbox bounds the open requests of one sandbox; more are answered with 429. 0 means 8192.
	MaxRequestsPerSandbox int
}

// The data paths that HTTP/1.1 may take.
const (
	// HTTP1Fast is the proxy's own.
	HTTP1Fast = "fast"
	// HTTP1Standard is net/http's, slower by far and used by many more.
	HTTP1Standard = "standard"
)

// Proxy is an http.Handler for sandbox traffic.
type Proxy struct {
	resolver  *resolver
	forwarder *forwarder
	metrics   *metrics
	logger    *slog.Logger

	drainTimeout   time.Duration
	maxConnections int
	http1          string
	trace          func(context.Context, string, func(string) string) (context.Context, func(int))
	stallTimeout   time.Duration
	connections    atomic.Int64
}

// New returns a Proxy; Serve, or an http.Server of the caller's, makes it answer. Errors: ErrInvalid.
func New(cfg Config) (*Proxy, error) {
	if cfg.Router == nil || cfg.Dialer == nil {
		return nil, sandbox.Invalidf("proxy: a router and a dialer are needed")
	}
	if cfg.HTTP1 != "" && cfg.HTTP1 != HTTP1Fast && cfg.HTTP1 != HTTP1Standard {
		return nil, sandbox.Invalidf("proxy: HTTP/1.1 by %q: want %s or %s", cfg.HTTP1, HTTP1Fast, HTTP1Standard)
	}
	withDefaults(&cfg)
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	f := newForwarder(cfg, m)
	return &Proxy{
		resolver:       &resolver{rules: newRules(cfg.Domain, cfg.PublicHosts), router: cfg.Router, signatures: cfg.Signatures, waits: f.waits, ready: cfg.Ready},
		forwarder:      f,
		metrics:        m,
		logger:         cfg.Logger,
		drainTimeout:   cfg.DrainTimeout,
		maxConnections: cfg.MaxConnections,
		http1:          cfg.HTTP1,
		trace:          cfg.Trace,
		stallTimeout:   stallTimeout,
	}, nil
}

func withDefaults(cfg *Config) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Ready == nil {
		cfg.Ready = func() bool { return true }
	}
	cfg.WaitTimeout = orDefault(cfg.WaitTimeout, defaultWaitTimeout)
	cfg.DialTimeout = orDefault(cfg.DialTimeout, defaultDialTimeout)
	cfg.DrainTimeout = orDefault(cfg.DrainTimeout, defaultDrainTimeout)
	cfg.MaxConnections = orDefault(cfg.MaxConnections, defaultMaxConnections)
	cfg.MaxRequestsPerSandbox = orDefault(cfg.MaxRequestsPerSandbox, defaultMaxRequestsPerSandbox)
}

func orDefault[T int | time.Duration](v, otherwise T) T {
	if v <= 0 {
		return otherwise
	}
	return v
}

// Drop cuts all open requests of a sandbox and forgets its connections. It is for whoever sees first that a sandbox has
// ended; requests fail also without it, when the node closes their connections.
func (p *Proxy) Drop(id sandbox.ID) { p.forwarder.guests.drop(id, errSandboxEnded) }

// Changed takes the news that a sandbox's route is another. What has ended has its open requests cut, and of what is on
// its way elsewhere the unused connections are closed, so that the node sees requests alone. It does not block.
func (p *Proxy) Changed(r sandbox.Route) { p.forwarder.guests.changed(r) }

// NodeDown takes the news that a node does not answer any more, and cuts the open requests to it.
func (p *Proxy) NodeDown(id sandbox.NodeID) { p.forwarder.guests.nodeDown(id) }

// Activities returns what every sandbox was used for that was used after since, and for the zero time all that is
// remembered. A sandbox without open requests is remembered for 2 minutes, and until since is past its last use.
func (p *Proxy) Activities(since time.Time) []sandbox.Activity {
	return p.forwarder.guests.activities(since)
}

// Open returns how many clients' connections Serve has open, and how many requests.
func (p *Proxy) Open() (connections, requests int) {
	return int(p.connections.Load()), int(p.metrics.inFlight.Load())
}

// ServeHTTP answers one request: by the guest that it names, or with an error in that guest's stead.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o := p.metrics.begin()
	defer o.end() // also when the data path cuts the connection by a panic

	dest, fail := p.resolver.resolve(r)
	if fail == nil {
		fail = p.forwarder.forward(w, r, dest, &o)
	}
	if fail == nil {
		return
	}
	o.status, o.failure = fail.status, fail.cause
	p.log(r.Context(), fail, r.Method, r.RemoteAddr)
	if fail.status == statusClientGone {
		panic(http.ErrAbortHandler) // an empty 200 would be a lie to a client that only closed its sending side
	}
	fail.write(w, r)
}

func (p *Proxy) log(ctx context.Context, fail *failure, method, remote string) {
	level := slog.LevelDebug
	if fail.cause == causeUnreachable {
		level = slog.LevelWarn
	}
	if !p.logger.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("sandbox_id", string(fail.id)), slog.Int("port", int(fail.port)), slog.String("cause", string(fail.cause)),
		slog.Int("status", fail.status), slog.String("method", method), slog.String("remote_addr", remote),
	}
	if fail.err != nil {
		attrs = append(attrs, slog.Any("err", fail.err))
	}
	p.logger.LogAttrs(ctx, level, "request not forwarded", attrs...)
}
