package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
)

// send sends what compose has written, starts the upload of the rest and waits for the first bytes of the answer.
func (t *transit) send() error {
	b := t.backend
	n, err := b.Write(t.client.out)
	t.wrote = t.wrote || n > 0
	if err != nil && t.reused && n == 0 {
		return &staleError{err: err, unsent: true}
	}
	if !t.body.complete.Load() {
		t.startUpload()
		t.expect.begin(t.client)
	}
	runtime.Gosched() // let the others go first: meanwhile the answer comes, and need not be waited for
	// A guest may have answered before it closed its end.
	n, readErr := b.Read(t.in)
	t.from, t.to = 0, n
	if n > 0 || readErr == nil {
		return nil
	}
	if err == nil {
		err = readErr
	}
	return &staleError{err: err}
}

// relay passes the answer on. An error means that nothing of it but interim answers has gone to the client.
func (t *transit) relay(ctx context.Context) error {
	for {
		n, err := t.readHead()
		if err != nil {
			return err
		}
		t.from += n
		switch {
		case t.head.Status == http.StatusSwitchingProtocols:
			return t.switchProtocol()
		case t.head.Status >= http.StatusOK:
			return t.passAnswer(ctx)
		}
		if t.interim += n; t.interim > maxGuestHeaderBytes {
			return fmt.Errorf("interim answers of more than %d bytes", maxGuestHeaderBytes)
		}
		if err := t.passInterim(); err != nil {
			return err
		}
	}
}

// readHead reads the head of an answer and returns its length.
func (t *transit) readHead() (int, error) {
	for {
		n, err := t.head.ParseAnswer(t.in[t.from:t.to])
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, h1.ErrIncomplete) {
			return 0, fmt.Errorf("read answer: %w", err)
		}
		if err := t.fill(); err != nil {
			return 0, err
		}
	}
}

// fill reads more of a head from the guest.
func (t *transit) fill() error {
	if t.from > 0 {
		t.to = copy(t.in, t.in[t.from:t.to])
		t.from = 0
	}
	if t.to == len(t.in) {
		if t.to >= maxGuestHeaderBytes {
			return fmt.Errorf("a head of more than %d bytes", maxGuestHeaderBytes)
		}
		t.in = append(t.in, make([]byte, len(t.in))...)
	}
	n, err := t.backend.Read(t.in[t.to:])
	t.to += n
	if n > 0 {
		return nil
	}
	return err
}

// passInterim passes an interim answer on to those who understand one. The permission to send a body goes only to those
// who ask for it.
func (t *transit) passInterim() error {
	c := t.client
	if c.head.Minor == 0 {
		return nil
	}
	if t.head.Status == http.StatusContinue {
		if c.head.Continue {
			return t.expect.grant(c)
		}
		return nil
	}
	out := append(h1.AppendFields(appendStatus(nil, &t.head), t.head.Fields), "\r\n"...)
	if _, err := c.conn.Write(out); err != nil {
		t.cut(errClientLeft)
		return err
	}
	return nil
}

// expectation is a client's wait for the permission to send a body.
type expectation struct {
	mu    sync.Mutex
	over  bool // it has been granted, or there is an answer
	timer *time.Timer
}

const permission = "HTTP/1.1 100 Continue\r\n\r\n"

// begin grants it after a while to the client of a guest that knows nothing of such things.
func (e *expectation) begin(c *clientConn) {
	if !c.head.Continue || c.head.Minor == 0 {
		return
	}
	e.timer = time.AfterFunc(expectTimeout, func() { _ = e.grant(c) }) // the upload meets a broken connection too
}

func (e *expectation) grant(c *clientConn) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over {
		return nil
	}
	e.over = true
	_, err := io.WriteString(c.conn, permission) // under the lock, lest it comes after an answer; it is 25 bytes
	return err
}

func (e *expectation) end() {
	if e.timer == nil {
		return
	}
	e.timer.Stop()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.over = true
}

// framing is how the end of an answer's body is known.
type framing int

const (
	framingNone framing = iota
	framingLength
	framingChunks
	framingEnd // of the connection
)

func (t *transit) framing() framing {
	switch h := &t.head; {
	case !h.HasBody(t.client.head.Method):
		return framingNone
	case h.Chunked:
		return framingChunks
	case h.Length >= 0:
		return framingLength
	}
	return framingEnd
}

// passAnswer passes a final answer on.
func (t *transit) passAnswer(ctx context.Context) error {
	t.expect.end()
	c := t.client
	by := t.framing()
	// With more of an upload to come nobody knows when the next request begins.
	t.keep = t.mayKeep() && t.body.complete.Load() && (c.head.Minor > 0 || by <= framingLength)
	out := t.appendHead(c.out[:0], by)
	var err error
	switch by {
	case framingNone:
		t.releaseEarly()
		err = t.write(out, 0)
	case framingLength:
		err = t.passLength(out)
	case framingChunks, framingEnd:
		s := stream{t: t, out: out, coded: by == framingChunks, chunked: c.head.Minor > 0}
		if err := s.frame(t.in[t.from:t.to]); err != nil {
			return err
		}
		t.from = t.to - s.rest
		err = s.pass(ctx)
	}
	t.outcome.status = t.head.Status
	if err != nil {
		t.abort(by)
		return nil //nolint:nilerr // the answer has begun: what it met can only cut it short
	}
	if by != framingEnd && t.reusable() {
		t.release()
	}
	return nil
}

// releaseEarly lets another request have the guest's connection before the client has the answer, all of which is here: the
// client's next request, on whatever connection, then finds it.
func (t *transit) releaseEarly() {
	if t.body.over == nil && t.reusable() {
		t.release()
	}
}

// reusable reports whether the guest's connection is where a next request can begin.
func (t *transit) reusable() bool {
	h := &t.head
	if t.from < t.to || h.Close || h.Minor == 0 && !h.KeepAlive || !t.body.complete.Load() {
		return false
	}
	if t.body.over == nil {
		return true
	}
	select {
	case <-t.body.over:
		return !t.body.broken
	case <-time.After(brokenGrace): // it has answered and not read all
		return false
	}
}

// abort ends the client's connection such that the answer cannot be taken for a whole one.
func (t *transit) abort(by framing) {
	t.keep, t.aborted = false, true
	c := t.client
	if secured, ok := c.conn.(*tls.Conn); ok {
		_ = secured.NetConn().Close() // without the alert that says that all was sent
	}
	if c.tcp != nil && c.head.Minor == 0 && by > framingLength {
		_ = c.tcp.SetLinger(0) // a reset, where an orderly end would mean that it is whole
	}
}

// write writes to the client, data bytes of which are of a body.
func (t *transit) write(out []byte, data int) error {
	t.proxy.metrics.sent(data)
	_, err := t.client.conn.Write(out)
	return err
}

// passLength passes on a body whose length is known.
func (t *transit) passLength(out []byte) error {
	n := int(min(t.head.Length, int64(t.to-t.from)))
	out = append(out, t.in[t.from:t.from+n]...)
	t.from += n
	left := t.head.Length - int64(n)
	if left == 0 {
		t.releaseEarly()
	}
	if err := t.write(out, n); err != nil || left == 0 {
		return err
	}
	if c, b := t.client.tcp, t.backend.tcp; left >= spliceFrom && c != nil && b != nil {
		for left > 0 {
			moved, err := splice(c, b, min(left, splicePiece))
			t.conns.pulse.beat()
			t.proxy.metrics.sent(int(moved))
			if err != nil {
				return err
			}
			left -= moved
		}
		return nil
	}
	return t.copyLength(left)
}

func (t *transit) copyLength(left int64) error {
	buf := buffers.Get()
	defer buffers.Put(buf)
	for left > 0 {
		n, err := t.backend.Read(buf[:min(left, int64(len(buf)))])
		t.conns.pulse.beat()
		if n == 0 && err != nil {
			return err
		}
		if err := t.write(buf[:n], n); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

// stream is a body whose end is marked, or is the connection's. What arrives of it goes on at once.
type stream struct {
	t       *transit
	chunks  h1.Chunks
	coded   bool // the guest sends chunks
	chunked bool // the client gets chunks
	out     []byte
	data    int // in out
	rest    int // bytes that follow the body
	done    bool
}

// frame appends to out what in has of the body.
func (s *stream) frame(in []byte) error {
	if !s.coded {
		s.add(in)
		return nil
	}
	for len(in) > 0 && !s.done {
		data, n, err := s.chunks.Next(in)
		if err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		in = in[n:]
		s.add(data)
		s.done = s.chunks.Done()
	}
	s.rest = len(in)
	if s.done && s.chunked {
		s.out = h1.AppendEnd(s.out, s.chunks.Trailer())
	}
	return nil
}

func (s *stream) add(data []byte) {
	s.data += len(data)
	if s.chunked {
		s.out = h1.AppendChunk(s.out, data)
	} else {
		s.out = append(s.out, data...)
	}
}

// pass writes what is there, and then whatever comes, until the end.
func (s *stream) pass(ctx context.Context) error {
	t := s.t
	in := t.in
	defer func() {
		if len(in) == bufferSize {
			buffers.Put(in)
		}
	}()
	for {
		if err := s.flush(); err != nil || s.done {
			return err
		}
		n, err := t.backend.Read(in)
		t.conns.pulse.beat()
		if n == 0 && err != nil {
			return s.end(ctx, err)
		}
		if err := s.frame(in[:n]); err != nil {
			return err
		}
		t.from, t.to = 0, s.rest
		if n == len(in) && n < bufferSize {
			in = buffers.Get() // small ones are for streams that may be silent for hours
		}
	}
}

func (s *stream) flush() error {
	if len(s.out) == 0 {
		return nil
	}
	err := s.t.write(s.out, s.data)
	s.out, s.data = s.out[:0], 0
	return err
}

// end takes the end of the connection for the body's, where nothing else marks that and it is not the sandbox's too.
func (s *stream) end(ctx context.Context, err error) error {
	t := s.t
	if s.coded || !errors.Is(err, io.EOF) {
		return err
	}
	if t.proxy.forwarder.hasEnded(context.WithoutCancel(ctx), t.dest) {
		return errSandboxEnded
	}
	if !s.chunked {
		return nil
	}
	s.out = h1.AppendEnd(s.out, nil)
	return s.flush()
}

// appendHead appends the head that the client gets.
func (t *transit) appendHead(out []byte, by framing) []byte {
	h, c := &t.head, t.client
	out = appendStatus(out, h)
	for i := range h.Fields {
		f := &h.Fields[i]
		switch {
		case f.Hop:
		case t.dest.prefix != "" && h1.Is(f.Name, "location"):
			out = h1.AppendField(out, f.Name, withPrefix(string(f.Value), t.dest.prefix, t.ask.host))
		default:
			out = h1.AppendField(out, f.Name, f.Value)
		}
	}
	if !h.HasDate {
		out = appendDate(out)
	}
	switch {
	case by == framingLength, by == framingNone && h.Length >= 0 && h.Status != http.StatusNoContent:
		out = append(out, "Content-Length: "...)
		out = append(strconv.AppendInt(out, h.Length, 10), "\r\n"...)
	case by != framingNone && c.head.Minor > 0:
		out = appendTrailerNames(append(out, "Transfer-Encoding: chunked\r\n"...), h)
	}
	return append(appendConnection(out, &c.head, t.keep), "\r\n"...)
}

// appendConnection says whether the client's connection may carry another request, where that does not go without saying.
func appendConnection(out []byte, request *h1.Head, keep bool) []byte {
	switch {
	case !keep:
		return append(out, "Connection: close\r\n"...)
	case request.Minor == 0:
		return append(out, "Connection: keep-alive\r\n"...)
	}
	return out
}

func appendStatus(out []byte, h *h1.Head) []byte {
	out = append(out, "HTTP/1.1 "...)
	out = append(strconv.AppendInt(out, int64(h.Status), 10), ' ')
	return append(append(out, h.Reason...), "\r\n"...)
}

// dateLine is a Date field, and the second that it is right for.
type dateLine struct {
	second int64
	line   string
}

//nolint:gochecknoglobals // a cache: making the line takes longer than all else in a head
var lastDate atomic.Pointer[dateLine]

// appendDate appends a Date, which a proxy has to add where there is none.
func appendDate(out []byte) []byte {
	now := time.Now()
	d := lastDate.Load()
	if d == nil || d.second != now.Unix() {
		d = &dateLine{now.Unix(), "Date: " + now.UTC().Format(http.TimeFormat) + "\r\n"}
		lastDate.Store(d)
	}
	return append(out, d.line...)
}
