package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// settleTime is how long the proxy waits for the reason why a sandbox ended: the node closes the sandbox's
	// connections at once, and the news of why arrives on another way.
	settleTime   = 300 * time.Millisecond
	settleLookup = time.Second
)

// errShutdown says that the proxy itself ends.
var errShutdown = errors.New("the proxy is shutting down")

// forwarder is the data path: it brings requests to guests over HTTP/1.1. It makes no decision on where they go.
type forwarder struct {
	guests  *guests
	waits   *waits
	router  router
	metrics *metrics
	young   time.Duration
	reverse httputil.ReverseProxy // what all requests have in common
}

func newForwarder(cfg Config, m *metrics) *forwarder {
	g := &guests{
		dialer: cfg.Dialer, dialTimeout: cfg.DialTimeout, maxRequests: cfg.MaxRequestsPerSandbox, metrics: m,
		byID: make(map[sandbox.ID]*guest), lastSweep: time.Now(),
	}
	return &forwarder{
		guests:  g,
		waits:   &waits{router: cfg.Router, guests: g, timeout: cfg.WaitTimeout, metrics: m, waking: make(map[sandbox.ID]*waking)},
		router:  cfg.Router,
		young:   young,
		metrics: m,
		reverse: httputil.ReverseProxy{FlushInterval: -1, ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug)},
	}
}

// forward brings r to its guest and the answer back. It returns a failure when nothing has been answered; when an answer
// has begun and cannot be completed it cuts the client's connection by panicking with http.ErrAbortHandler.
func (f *forwarder) forward(w http.ResponseWriter, r *http.Request, dest destination, o *outcome) *failure {
	ctx, cancel := context.WithCancelCause(r.Context())
	ex := &exchange{forwarder: f, dest: dest, client: r, control: http.NewResponseController(w), cancel: cancel, outcome: o}
	if r.Body != nil && r.Body != http.NoBody && r.ContentLength != 0 {
		ex.upload = &upload{body: r.Body, metrics: f.metrics}
		if r.ProtoMajor == 1 {
			_ = ex.control.EnableFullDuplex() // a writer that cannot answers before it reads; nothing is lost but time
		}
	}
	joined, fail := f.guests.join(dest, ex)
	if fail != nil {
		cancel(nil)
		return fail
	}
	ex.transport = joined.transport
	defer f.guests.leave(dest.id, ex)
	defer ex.finish()
	reverse := f.reverse
	reverse.Rewrite, reverse.Transport, reverse.BufferPool = ex.rewrite, ex, ex
	reverse.ModifyResponse, reverse.ErrorHandler = ex.answered, ex.failed
	reverse.ServeHTTP(w, r.WithContext(ctx))
	if ex.fail != nil && ex.uploading() && r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close") // what is left of the upload must not be read as a request
	}
	return ex.fail
}

// rewrite turns a client's request into the guest's.
func (ex *exchange) rewrite(pr *httputil.ProxyRequest) {
	out := pr.Out
	out.URL = guestURL(ex.dest.target, pr.In.URL)
	out.Host = pr.In.Host // servers in guests check it
	for name := range out.Header {
		if strings.HasPrefix(name, "X-Forwarded-") {
			delete(out.Header, name)
		}
	}
	delete(out.Header, "X-Real-Ip")
	pr.SetXForwarded()
	if ex.dest.prefix != "" {
		out.Header.Set("X-Forwarded-Prefix", ex.dest.prefix)
	}
	if ex.upload != nil || !mayUpgrade(ex.dest.port, out.Header.Get("Upgrade")) {
		delete(out.Header, "Connection")
		delete(out.Header, "Upgrade")
	}
	delete(out.Header, "Http2-Settings")
	if ex.upload != nil {
		out.Body, out.GetBody = ex.upload, ex.upload.again
		out.Trailer = pr.In.Trailer // the server fills it in when the body has been read
	}
}

// guestURL is the URL of t's guest; path and query pass as the client wrote them.
func guestURL(t target, in *url.URL) *url.URL {
	u := &url.URL{Scheme: "http", Host: guestAddr(t), RawPath: t.path, RawQuery: in.RawQuery, ForceQuery: in.ForceQuery}
	path, err := url.PathUnescape(t.path)
	if err != nil { // cannot happen: the server has parsed it
		path = t.path
	}
	u.Path = path
	return u
}

// mayUpgrade reports whether a connection may leave HTTP/1.1 behind, and with it the proxy's view of single requests:
// never to the agent, which has routes to protect, and never to HTTP/2, which has to be asked for at its beginning.
func mayUpgrade(port uint16, protocol string) bool {
	p := strings.ToLower(protocol)
	return port != GuestAgentPort && !strings.Contains(p, "h2c") && !strings.Contains(p, "http/")
}

// answered sees the head of each answer before the client does.
func (ex *exchange) answered(res *http.Response) error {
	m := ex.forwarder.metrics
	ex.outcome.status = res.StatusCode
	if res.StatusCode == http.StatusSwitchingProtocols {
		if rw, ok := res.Body.(io.ReadWriteCloser); ok {
			res.Body = &duplex{ReadWriteCloser: rw, metrics: m}
		}
		ex.setUpgraded()
		return nil
	}
	if ex.dest.prefix != "" {
		prefixLocation(res.Header, ex.dest.prefix, ex.client.Host)
	}
	if ex.uploading() && ex.client.ProtoMajor == 1 {
		res.Header.Set("Connection", "close") // as above, and nobody knows when the upload ends
	}
	ex.stream = res.ContentLength < 0
	untilEOF := ex.stream && len(res.TransferEncoding) == 0
	ctx := context.WithoutCancel(res.Request.Context())
	res.Body = &download{ReadCloser: res.Body, metrics: m, untilEOF: untilEOF, ended: func() bool { return ex.forwarder.hasEnded(ctx, ex.dest) }}
	return nil
}

// prefixLocation makes a redirection within a guest one within its path on the proxy, unless the guest has done so.
func prefixLocation(h http.Header, prefix, host string) {
	location := h.Get("Location")
	if prefixed := withPrefix(location, prefix, host); prefixed != location {
		h.Set("Location", prefixed)
	}
}

func withPrefix(location, prefix, host string) string {
	u, err := url.Parse(location)
	if err != nil || !strings.HasPrefix(u.Path, "/") || (u.Host != "" && !strings.EqualFold(u.Host, host)) {
		return location
	}
	if u.Path == prefix || strings.HasPrefix(u.Path, prefix+"/") {
		return location
	}
	if u.RawPath != "" {
		u.RawPath = prefix + u.RawPath
	}
	u.Path = prefix + u.Path
	return u.String()
}

// failed is called when the guest gave no answer; forward returns what it finds.
func (ex *exchange) failed(_ http.ResponseWriter, r *http.Request, err error) {
	if ex.fail == nil {
		ex.fail = ex.forwarder.diagnose(context.WithoutCancel(r.Context()), ex.dest, ex.unanswered(r.Context(), err))
	}
}

// unanswered is what a request met instead of an answer.
type unanswered struct {
	err        error
	cut        error // why it was cut from outside, if it was
	broken     error // how the guest's connection broke, if it did
	clientLeft bool
}

// diagnose says why a guest gave no answer.
func (f *forwarder) diagnose(ctx context.Context, dest destination, u unanswered) *failure {
	t, err := dest.target, u.err
	var dial *dialError
	switch {
	case errors.Is(u.cut, errShutdown):
		return shuttingDown(t, err)
	case errors.Is(u.cut, errSandboxEnded):
		return f.sandboxEnded(ctx, dest, err)
	case errors.As(err, &dial) && (errors.Is(err, sandbox.ErrNotFound) || errors.Is(err, sandbox.ErrConflict)):
		return f.nodeLacks(ctx, dest, err)
	case errors.As(err, &dial):
		return undialled(t, dial)
	case u.clientLeft:
		return clientGone(t, err)
	case errors.Is(err, errSandboxEnded), errors.Is(u.broken, errSandboxEnded), f.hasEnded(ctx, dest):
		return f.sandboxEnded(ctx, dest, err)
	}
	return &failure{
		status: http.StatusBadGateway, cause: causeGuest, id: t.id, port: t.port, title: "No Answer",
		message: "The server inside the sandbox closed the connection before it answered, or gave an answer that is not HTTP", err: err,
	}
}

// undialled answers when the guest could not be connected to.
func undialled(t target, err error) *failure {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{
			status: http.StatusGatewayTimeout, cause: causeTimeout, id: t.id, port: t.port,
			message: "The sandbox did not accept the connection in time", err: err,
		}
	case errors.Is(err, syscall.ECONNREFUSED):
		return portClosed(t, err)
	}
	return unreachable(t, err)
}

// nodeLacks answers when the router still names a node that the sandbox has left, or where it is being paused or resumed.
func (f *forwarder) nodeLacks(ctx context.Context, dest destination, err error) *failure {
	route, ok := f.settle(ctx, dest)
	switch {
	case !ok && errors.Is(err, sandbox.ErrConflict):
		route.State = sandbox.StatePausing // or back already: the next request gets through
	case !ok:
		return notFound(dest.target, err)
	}
	fail := notServing(dest.target, route)
	fail.err = err
	return fail
}

// sandboxEnded answers for a request that its sandbox did not outlive.
func (f *forwarder) sandboxEnded(ctx context.Context, dest destination, err error) *failure {
	route, _ := f.settle(ctx, dest)
	fail := &failure{
		status: http.StatusBadGateway, cause: causeEnded, id: dest.id, port: dest.port, title: "Sandbox Ended",
		message: withReason("The sandbox ended while the request was open", route.Reason), err: err,
	}
	switch route.State { //nolint:exhaustive // all others have ended, or nothing is known of them
	case sandbox.StatePausing, sandbox.StatePaused, sandbox.StateResuming:
		fail.title, fail.message = "Sandbox Paused", "The sandbox was paused while the request was open"
	default:
	}
	return fail
}

// settle waits a moment for the news that a sandbox no longer runs, and why. It is not ok when there is no such news.
func (f *forwarder) settle(ctx context.Context, dest destination) (sandbox.Route, bool) {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	route, err := f.router.Route(ctx, dest.id)
	for err == nil && route.State == sandbox.StateRunning {
		route, err = f.router.Await(ctx, dest.id, route)
	}
	return route, err == nil
}

// hasEnded reports whether a sandbox no longer runs.
func (f *forwarder) hasEnded(ctx context.Context, dest destination) bool {
	ctx, cancel := context.WithTimeout(ctx, settleLookup)
	defer cancel()
	route, err := f.router.Route(ctx, dest.id)
	if err != nil {
		return errors.Is(err, sandbox.ErrNotFound)
	}
	return notServing(dest.target, route) != nil
}
