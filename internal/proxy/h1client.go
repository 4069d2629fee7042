package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
)

const (
	clientBuffer = 4 << 10 // grows with the head
	// idleRenewal is how old a deadline for the next request may be: setting it anew for each request costs.
	idleRenewal = 30 * time.Second
	// http2Preface is how a client begins that speaks HTTP/2 without having asked.
	http2Preface = "PRI * HTTP/2.0\r\n"
)

// Ends of a client's connection that are nobody's fault.
var (
	errHandOver   = errors.New("this connection belongs to net/http")
	errDone       = errors.New("the connection ends")
	errClientLeft = errors.New("the client left")
)

// clientConn is a connection of the fast path. One goroutine reads requests from it and answers them, one after another;
// beside it there is at most one more that reads: an upload's, or the watch while an answer is awaited.
type clientConn struct {
	server *fastServer
	conn   net.Conn     // with TLS, where there is TLS
	tcp    *net.TCPConn // nil unless bytes can go to it as they are
	secure bool
	remote string // host and port
	host   []byte // of remote

	buf      []byte // [next, end) has been read and not been used
	next     int
	end      int
	head     h1.Head // of the current request; its slices are parts of buf
	deadline time.Time
	limited  bool   // deadline is that of the head that is being read
	out      []byte // for what is written at once
	known    known
	fields   []h1.Field // room for those of answers; empty

	state atomic.Int32 // clientIdle to clientClosing
	watch watch
}

const (
	clientBusy int32 = iota
	clientIdle
	clientClosing
)

// serve answers requests until the connection ends or is to be another's. It does not close it.
func (c *clientConn) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c.watch.cancel = cancel
	for first := true; ; first = false {
		n, err := c.readHead(first)
		if bad, ok := errors.AsType[*h1.Error](err); ok {
			c.refuse(ctx, bad)
			return errDone
		}
		if err != nil {
			return err
		}
		if c.server.isForeign(c.head.Host) {
			return errHandOver
		}
		c.next += n
		if !c.answer(ctx) {
			return errDone
		}
	}
}

// readHead reads the next request's head and returns its length.
func (c *clientConn) readHead(first bool) (int, error) {
	c.compact()
	c.limited = false
	skip := !first // the empty line that old clients send after a body
	for fresh := c.end > 0; ; {
		if skip && bytes.HasPrefix(c.buf[:c.end], []byte("\r\n")) {
			c.next, skip = len("\r\n"), false
			c.compact()
		}
		if fresh {
			if first && bytes.HasPrefix(c.buf[:c.end], []byte(http2Preface)) {
				return 0, errHandOver
			}
			n, err := c.head.ParseRequest(c.buf[:c.end])
			if !errors.Is(err, h1.ErrIncomplete) {
				return n, tooLong(n, err)
			}
		}
		if c.end >= maxHeaderBytes {
			return 0, tooLong(c.end, nil)
		}
		before := c.end
		if err := c.fill(); err != nil {
			return 0, err
		}
		fresh = bytes.IndexByte(c.buf[before:c.end], '\n') >= 0
	}
}

func tooLong(n int, err error) error {
	if err == nil && n >= maxHeaderBytes {
		return &h1.Error{Status: http.StatusRequestHeaderFieldsTooLarge, Text: "a head of more than 64 KiB"}
	}
	return err
}

// compact moves what is left to the front.
func (c *clientConn) compact() {
	c.end = copy(c.buf, c.buf[c.next:c.end])
	c.next = 0
	if c.end == 0 && len(c.buf) > 4*clientBuffer {
		c.buf = make([]byte, clientBuffer) // the long head was one, and the connection may be kept for hours
	}
}

// fill reads more of a head. The first bytes may take the idle timeout, the others as long as a head.
func (c *clientConn) fill() error {
	if c.end == 0 {
		if err := c.idle(); err != nil {
			return err
		}
	} else if !c.limited {
		c.limited = true
		c.setDeadline(time.Now().Add(readHeaderTimeout))
	}
	if c.end+1 >= len(c.buf) {
		c.buf = append(c.buf, make([]byte, len(c.buf))...)
	}
	n, err := c.conn.Read(c.buf[c.end : len(c.buf)-1]) // the last byte is the watch's
	c.end += n
	if n > 0 {
		if c.state.Load() == clientIdle && !c.state.CompareAndSwap(clientIdle, clientBusy) {
			return errDone
		}
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// idle begins the time between two requests.
func (c *clientConn) idle() error {
	if now := time.Now(); c.deadline.Before(now.Add(idleTimeout - idleRenewal)) {
		c.setDeadline(now.Add(idleTimeout))
	}
	c.state.Store(clientIdle)
	if c.server.draining.Load() {
		return errDone
	}
	return nil
}

func (c *clientConn) setDeadline(at time.Time) {
	c.deadline = at
	_ = c.conn.SetReadDeadline(at) // a connection that cannot is a connection that is gone
}

// refuse answers bytes that are no request, and ends.
func (c *clientConn) refuse(ctx context.Context, bad *h1.Error) {
	o := c.server.proxy.metrics.begin()
	fail := &failure{status: bad.Status, cause: causeBadRequest, message: bad.Text, err: bad}
	o.status, o.failure = fail.status, fail.cause
	c.server.proxy.log(ctx, fail, "", c.remote)
	o.end()
	c.head = h1.Head{Minor: 1}
	c.writeFailure(fail, false)
	c.linger()
}

// answer answers the request whose head has been read, and reports whether another may follow.
func (c *clientConn) answer(ctx context.Context) bool {
	p := c.server.proxy
	t := newTransit(c, p)
	c.out = streamBuffers.Get()[:0]
	defer c.putOut()
	if p.trace != nil {
		spanned, end := p.trace(ctx, string(c.head.Method), c.head.Get)
		ctx = spanned
		defer func() { end(t.outcome.status) }()
	}
	c.lookOut(t)
	fail := t.route(ctx)
	if fail == nil {
		fail = t.forward(ctx)
	}
	t.finish()
	if fail == nil {
		t.outcome.end()
		if !t.keep && !t.aborted {
			c.linger()
		}
		return t.keep
	}
	t.outcome.status, t.outcome.failure = fail.status, fail.cause
	p.log(ctx, fail, string(c.head.Method), c.remote)
	t.outcome.end()
	if fail.status == statusClientGone {
		return false
	}
	keep := t.body.skip(c) && t.mayKeep()
	c.writeFailure(fail, keep)
	if !keep {
		c.linger()
	}
	return keep
}

// putOut gives the buffer for writing back, unless it has grown with a long head.
func (c *clientConn) putOut() {
	if cap(c.out) == streamBufferSize {
		streamBuffers.Put(c.out[:streamBufferSize])
	}
	c.out = nil
}

// linger ends the connection such that what was written is read, even by a client that is still sending.
func (c *clientConn) linger() {
	c.state.Store(clientBusy)
	_ = c.conn.SetReadDeadline(time.Now().Add(lingerTime))
	halfClose(c.conn)
	_, _ = io.Copy(onlyWriter{io.Discard}, onlyReader{c.conn}) // until it has closed too, or the time is over
}

// onlyReader hides every method but Read.
type onlyReader struct{ io.Reader }
