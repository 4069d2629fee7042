package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// transit is one request on its way through the fast path.
type transit struct {
	client  *clientConn
	proxy   *Proxy
	outcome outcome
	dest    destination
	ask     head
	body    intake
	conns   conns

	in      []byte  // what has come from the guest and is not used is [from, to)
	from    int     // see in
	to      int     // see in
	head    h1.Head // of the guest's answer
	interim int     // bytes of interim answers
	wrote   bool    // to the guest, if only in part
	reused  bool    // the connection has carried a request before
	keep    bool    // the client's connection may carry another
	aborted bool    // the answer has begun and cannot be completed
	expect  expectation

	mu      sync.Mutex
	backend *backend
	dialing context.CancelCauseFunc
	why     error // of the first cut
}

func newTransit(c *clientConn, p *Proxy) *transit {
	t := &transit{client: c, proxy: p, outcome: p.metrics.begin()}
	t.head.Fields = c.fields
	t.body.metrics = p.metrics
	t.body.open(&c.head)
	return t
}

// route decides where the request goes.
func (t *transit) route(ctx context.Context) *failure {
	c := t.client
	if string(c.head.Method) == http.MethodConnect {
		return connectRefused()
	}
	var err error
	if t.ask, err = askOf(&c.head, &c.known); err != nil {
		return badRequest(err)
	}
	var fail *failure
	t.dest, fail = t.proxy.resolver.resolveHead(ctx, t.ask)
	if fail != nil && t.left() {
		return clientGone(t.dest.target, fail.err)
	}
	return fail
}

// forward brings the request to its guest and the answer back. A failure means that nothing has been answered.
func (t *transit) forward(ctx context.Context) *failure {
	g := t.proxy.forwarder.guests
	joined, fail := g.join(t.dest, t)
	if fail != nil {
		return fail
	}
	defer g.leave(t.dest.id, t)
	t.conns = joined
	t.in = streamBuffers.Get()
	defer func() {
		if len(t.in) == streamBufferSize { // it grows with a long head, and is then one of its kind
			streamBuffers.Put(t.in)
		}
	}()
	defer t.drop()
	if err := t.compose(); err != nil {
		return badRequest(err)
	}
	for {
		err := t.exchange(ctx)
		if err == nil {
			return nil
		}
		t.stopUpload()
		if again, fail := t.again(ctx, err); !again {
			return fail
		}
	}
}

// again reports whether the request is to be sent again, because its sandbox has moved, and makes that possible. If not,
// it returns the answer.
func (t *transit) again(ctx context.Context, err error) (bool, *failure) {
	f := t.proxy.forwarder
	var bad *uploadError
	u := t.unanswered(err)
	if errors.As(u.err, &bad) || errors.As(u.cut, &bad) {
		return false, badRequest(bad)
	}
	dest, again, fail := f.again(ctx, t.dest, u, resendable(t.ask.method, t.wrote, t.body.pumping()))
	var to conns
	if again {
		to, fail = f.guests.move(dest, t)
	}
	switch {
	case fail != nil:
		return false, fail
	case !again:
		return false, f.diagnose(context.WithoutCancel(ctx), t.dest, u)
	}
	t.drop()
	t.dest, t.conns = dest, to
	return true, nil
}

// unanswered says what the request met instead of an answer.
func (t *transit) unanswered(err error) unanswered {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.why == nil {
		err = endOf(err)
	}
	return unanswered{err: err, cut: t.why, clientLeft: errors.Is(t.why, errClientLeft)}
}

// endOf marks the error of a connection that the node has closed: its sandbox has ended.
func endOf(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, sandbox.ErrNotFound) {
		return errors.Join(errSandboxEnded, err)
	}
	return err
}

// exchange sends the request and passes the answer on. An error means that no answer has begun.
func (t *transit) exchange(ctx context.Context) error {
	if err := t.connect(ctx, true); err != nil {
		return err
	}
	err := t.send()
	if err == nil {
		return t.relay(ctx)
	}
	if !t.reused || !t.stale(err) {
		return err
	}
	t.drop()
	if err := t.connect(ctx, false); err != nil {
		return err
	}
	if err := t.send(); err != nil {
		return err
	}
	return t.relay(ctx)
}

// staleError is how a connection failed before a byte of the answer came.
type staleError struct {
	err    error
	unsent bool // nor has any of the request gone
}

func (e *staleError) Error() string { return e.err.Error() }
func (e *staleError) Unwrap() error { return e.err }

// stale reports whether the request may be sent over another connection: if the guest cannot have seen it, or if it does
// not matter how often it sees it, and all of it is still here.
func (t *transit) stale(err error) bool {
	var stale *staleError
	if !errors.As(err, &stale) || t.isCut() || t.body.pumping() {
		return false
	}
	return stale.unsent || t.body.complete.Load() && repeatable(&t.client.head)
}

// repeatable follows net/http: PUT and DELETE are meant to be, but servers are not always.
func repeatable(h *h1.Head) bool {
	switch string(h.Method) {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return h.Get("Idempotency-Key") != "" || h.Get("X-Idempotency-Key") != ""
}

// connect gets a connection to the guest, a kept one if it may.
func (t *transit) connect(ctx context.Context, kept bool) error {
	if kept {
		if b := t.conns.pool.get(t.dest.port); b != nil {
			t.reused = true
			return t.hold(b)
		}
	}
	t.reused = false
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t.mu.Lock()
	t.dialing = cancel
	why := t.why
	t.mu.Unlock()
	if why != nil {
		return why
	}
	conn, err := t.proxy.forwarder.guests.connect(ctx, t.dest.route, t.dest.port)
	if err != nil {
		return err
	}
	return t.hold(newBackend(conn))
}

func (t *transit) hold(b *backend) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dialing = nil
	if t.why != nil {
		_ = b.Close()
		return t.why
	}
	t.backend = b
	return nil
}

// drop closes the guest's connection, if there is still one.
func (t *transit) drop() {
	t.mu.Lock()
	b := t.backend
	t.backend = nil
	t.mu.Unlock()
	if b != nil {
		_ = b.Close()
	}
}

// release lets another request have the guest's connection.
func (t *transit) release() {
	t.mu.Lock()
	b := t.backend
	if t.why != nil {
		b = nil // drop closes it
	} else {
		t.backend = nil
	}
	t.mu.Unlock()
	if b != nil {
		t.conns.pool.put(t.dest.port, b)
	}
}

// cut ends the request from outside. It may be called at any time.
func (t *transit) cut(why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.why != nil {
		return
	}
	t.why = why
	if t.dialing != nil {
		t.dialing(why)
	}
	if t.backend != nil {
		_ = t.backend.Close() // under the lock, lest it is another's by then; closing does not wait
	}
}

func (t *transit) isCut() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.why != nil
}

func (t *transit) left() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Is(t.why, errClientLeft)
}

// finish gives the client's buffer and connection back to its goroutine.
func (t *transit) finish() {
	t.stopUpload()
	t.expect.end()
	t.client.lookAway()
	clear(t.head.Fields[:cap(t.head.Fields)]) // they hold the buffer that the answer came in
	t.client.fields = t.head.Fields[:0]
}

// mayKeep reports whether the client wants its connection kept, and may.
func (t *transit) mayKeep() bool {
	h := &t.client.head
	return (h.Minor > 0 && !h.Close || h.Minor == 0 && h.KeepAlive && !h.Close) && !t.client.server.draining.Load()
}
