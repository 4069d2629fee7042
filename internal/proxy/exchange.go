package proxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// brokenGrace is how long the reading of an upload goes on after the guest's connection has broken: a client that
	// is sending meets the broken connection by itself, one that is silent has to be waited for no longer.
	brokenGrace = 50 * time.Millisecond
	// lingerTime is how long the rest of an upload is read once the answer is complete, lest the client's own
	// connection breaks before it has read that answer.
	lingerTime = 500 * time.Millisecond
)

// exchange is one request on its way through the data path. It is also its own reverse proxy's transport and buffers.
type exchange struct {
	forwarder *forwarder
	dest      destination
	client    *http.Request
	control   *http.ResponseController
	cancel    context.CancelCauseFunc
	outcome   *outcome
	upload    *upload // nil without a body

	transport *http.Transport // set by guests.join
	fail      *failure        // set by again and failed, on the request's own goroutine
	stream    bool            // the answer has no known length; set by answered, likewise

	mu       sync.Mutex
	finished bool  // the response writer must not be used any more
	upgraded bool  // nor its read deadline
	waiting  bool  // for the head of the guest's answer
	stopped  bool  // the upload, by us
	broken   error // how the guest's connection broke while waiting
}

// RoundTrip sends r to its guest and waits for the head of the answer; it does so again where the guest has moved.
func (ex *exchange) RoundTrip(r *http.Request) (*http.Response, error) {
	for {
		res, wrote, err := ex.send(r)
		if err == nil || !ex.again(r, wrote, err) {
			return res, err
		}
	}
}

// again reports whether r is to be sent again after err, and makes that possible.
func (ex *exchange) again(r *http.Request, wrote bool, err error) bool {
	begun := ex.upload != nil && ex.upload.begun()
	dest, again, fail := ex.forwarder.again(r.Context(), ex.dest, ex.unanswered(r.Context(), err), resendable(r.Method, wrote, begun))
	var to conns
	if again {
		to, fail = ex.forwarder.guests.move(dest, ex)
	}
	ex.fail = fail
	if !again || fail != nil {
		return false
	}
	ex.dest, ex.transport = dest, to.transport
	return true
}

// unanswered says what the exchange met instead of an answer.
func (ex *exchange) unanswered(ctx context.Context, err error) unanswered {
	broken, stopped := ex.brokenBy()
	left := !stopped && (ctx.Err() != nil || ex.upload != nil && ex.upload.failed.Load())
	return unanswered{err: err, cut: context.Cause(ctx), broken: broken, clientLeft: left}
}

// send sends r over a connection to its guest and waits for the head of the answer. wrote tells whether the guest may
// have got any of it.
func (ex *exchange) send(r *http.Request) (res *http.Response, wrote bool, err error) {
	var conn *guestConn
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if c, ok := info.Conn.(*guestConn); ok {
			conn = c
			ex.wait()
			c.wrote.Store(false)
			c.user.Store(ex)
		}
	}}
	res, err = ex.transport.RoundTrip(r.WithContext(httptrace.WithClientTrace(r.Context(), trace)))
	if conn != nil {
		conn.user.CompareAndSwap(ex, nil)
		wrote = conn.wrote.Load()
	}
	ex.mu.Lock()
	defer ex.mu.Unlock()
	ex.waiting = false
	return res, wrote, err
}

// wait begins waiting for an answer over a connection, the first one or a fresh one after a pooled one that was closed.
func (ex *exchange) wait() {
	ex.mu.Lock()
	defer ex.mu.Unlock()
	ex.waiting = true
	if ex.broken != nil && ex.stopped {
		ex.stopped = false
		_ = ex.control.SetReadDeadline(time.Time{}) // a connection that cannot is a connection that is gone
	}
	ex.broken = nil
}

// guestBroke is called when the guest's connection has broken. http.Transport reports that only after it has finished
// reading the upload, so a silent client would keep the error back.
func (ex *exchange) guestBroke(err error) {
	ex.mu.Lock()
	defer ex.mu.Unlock()
	if ex.waiting && ex.broken == nil {
		ex.broken = err
		ex.stopUploadLocked(brokenGrace)
	}
}

// brokenBy returns how the guest's connection broke before an answer came, and whether the upload was then stopped.
func (ex *exchange) brokenBy() (error, bool) {
	ex.mu.Lock()
	defer ex.mu.Unlock()
	return ex.broken, ex.stopped
}

// cut ends the exchange from outside.
func (ex *exchange) cut(why error) {
	ex.cancel(why)
	ex.mu.Lock()
	defer ex.mu.Unlock()
	ex.stopUploadLocked(brokenGrace)
}

// finish is the last thing that happens to an exchange. After it nobody reads the upload but the client's server, which
// looks for its end, so that the connection can be used again or closed without breaking the answer; not for long.
func (ex *exchange) finish() {
	ex.cancel(nil)
	ex.mu.Lock()
	defer ex.mu.Unlock()
	if ex.client.ProtoMajor == 1 && !ex.upgraded && ex.uploading() {
		ex.upload.close(func() { _ = ex.control.SetReadDeadline(time.Unix(1, 0)) })
		ex.stopUploadLocked(lingerTime)
	}
	ex.finished = true
}

// Get returns a buffer for the answer's body: a small one for a stream, which may hold it for hours without a byte.
func (ex *exchange) Get() []byte {
	if ex.stream {
		return streamBuffers.Get()
	}
	return buffers.Get()
}

// Put takes a buffer of Get back.
func (ex *exchange) Put(b []byte) {
	if ex.stream {
		streamBuffers.Put(b)
		return
	}
	buffers.Put(b)
}

func (ex *exchange) setUpgraded() {
	ex.mu.Lock()
	defer ex.mu.Unlock()
	ex.upgraded = true
}

// uploading reports whether there is more of the request's body than has been read.
func (ex *exchange) uploading() bool { return ex.upload != nil && !ex.upload.complete.Load() }

// stopUploadLocked lets no read of the upload last longer than d from now.
func (ex *exchange) stopUploadLocked(d time.Duration) {
	if ex.finished || ex.upgraded || !ex.uploading() {
		return
	}
	ex.stopped = true
	_ = ex.control.SetReadDeadline(time.Now().Add(d)) // as in wait
}

// upload is a request's body. It is read by one goroutine at a time, which may outlive the request.
type upload struct {
	body     io.Reader
	metrics  *metrics
	complete atomic.Bool // read to its end
	failed   atomic.Bool // reading gave an error

	mu      sync.Mutex
	reading chan struct{} // closed when the latest Read is over; nil before the first
	closed  bool
}

// errUploadClosed is what a guest's connection reads once its request is over.
var errUploadClosed = errors.New("the request is over")

// Read reads from the client.
func (u *upload) Read(p []byte) (int, error) {
	over := make(chan struct{})
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return 0, errUploadClosed
	}
	u.reading = over
	u.mu.Unlock()
	n, err := u.body.Read(p)
	switch {
	case errors.Is(err, io.EOF):
		u.complete.Store(true)
	case err != nil:
		u.failed.Store(true)
	}
	close(over)
	u.metrics.received(n)
	return n, err
}

// close returns once nobody reads from the client any more; wake makes a Read that waits return.
func (u *upload) close(wake func()) {
	u.mu.Lock()
	u.closed = true
	reading := u.reading
	u.mu.Unlock()
	if reading == nil {
		return
	}
	select {
	case <-reading:
		return
	default:
		wake()
	}
	<-reading
}

// Close does nothing: the client's body belongs to its server.
func (u *upload) Close() error { return nil }

// begun reports whether any of the body has been read.
func (u *upload) begun() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.reading != nil
}

// again lets a request be sent over a fresh connection when a pooled one turns out to be closed: only if nothing of the
// body has been read, since nothing of it is kept.
func (u *upload) again() (io.ReadCloser, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.reading != nil {
		return nil, errors.New("the upload has begun and cannot be sent again")
	}
	return u, nil
}

// download is the body of a guest's answer.
type download struct {
	io.ReadCloser
	metrics *metrics
	// untilEOF means that nothing but the end of the connection marks the end of the body.
	untilEOF bool
	ended    func() bool
}

// Read reads from the guest. A body that ends because its sandbox did is an error.
func (d *download) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	d.metrics.sent(n)
	if d.untilEOF && errors.Is(err, io.EOF) && d.ended() {
		err = errSandboxEnded
	}
	return n, err
}

// duplex is an upgraded connection to a guest.
type duplex struct {
	io.ReadWriteCloser
	metrics *metrics
}

// Read reads from the guest.
func (d *duplex) Read(p []byte) (int, error) {
	n, err := d.ReadWriteCloser.Read(p)
	d.metrics.sent(n)
	return n, err
}

// Write writes to the guest.
func (d *duplex) Write(p []byte) (int, error) {
	n, err := d.ReadWriteCloser.Write(p)
	d.metrics.received(n)
	return n, err
}

// CloseWrite ends the direction towards the guest.
func (d *duplex) CloseWrite() error {
	if half, ok := d.ReadWriteCloser.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return d.Close()
}
