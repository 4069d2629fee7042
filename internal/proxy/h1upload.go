package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
)

const (
	// spliceFrom is the length of a body from which on the kernel moves it by itself.
	spliceFrom = 32 << 10
	// splicePiece is what it moves before somebody counts. The last piece of an upload is moved by hand, so that it is
	// known to be complete before the guest knows.
	splicePiece = 1 << 20
	spliceTail  = 16 << 10
	// chunkMargin is what framing may add to a piece of a chunked upload.
	chunkMargin = 1 << 10
)

// intake is the body of a request, between the client and the guest.
type intake struct {
	metrics  *metrics
	left     int64 // of a body with a length
	chunked  bool
	chunks   h1.Chunks
	complete atomic.Bool // read from the client to its end

	over   chan struct{} // closed when the pump is; nil before there is one
	broken bool          // the guest did not take all; read after over
}

func (in *intake) open(h *h1.Head) {
	in.left, in.chunked = max(h.Length, 0), h.Chunked
	if !in.chunked && in.left == 0 {
		in.complete.Store(true)
	}
}

// take appends to out, in the guest's framing, what buf has of the body, and returns how much of buf that is.
func (in *intake) take(out, buf []byte) ([]byte, int, error) {
	if !in.chunked {
		n := int(min(in.left, int64(len(buf))))
		in.metrics.received(n)
		if in.left -= int64(n); in.left == 0 {
			in.complete.Store(true)
		}
		return append(out, buf[:n]...), n, nil
	}
	used := 0
	for {
		data, n, err := in.chunks.Next(buf[used:])
		used += n
		if err != nil {
			return out, used, &uploadError{err}
		}
		if len(data) == 0 {
			break
		}
		in.metrics.received(len(data))
		out = h1.AppendChunk(out, data)
	}
	if in.chunks.Done() && !in.complete.Swap(true) {
		out = h1.AppendEnd(out, in.chunks.Trailer())
	}
	return out, used, nil
}

// skip reports whether the client's connection is at the end of the body, passing over what has arrived of it.
func (in *intake) skip(c *clientConn) bool {
	if in.complete.Load() {
		return true
	}
	if in.over != nil || in.chunked || in.left > int64(c.end-c.next) {
		return false
	}
	c.next += int(in.left)
	return true
}

func (in *intake) pumping() bool { return in.over != nil }

// startUpload lets a goroutine move the rest of the body, since the guest may answer before it has all of it.
func (t *transit) startUpload() {
	c := t.client
	c.lookAway()
	c.setDeadline(time.Time{}) // a stream may be silent for as long as it likes
	t.body.over = make(chan struct{})
	b := t.backend
	go func() {
		defer close(t.body.over)
		if err := t.upload(b); err != nil {
			t.body.broken = true
			return
		}
		c.lookOut(t)
	}()
}

// stopUpload returns once nobody reads from the client for the upload any more.
func (t *transit) stopUpload() {
	if t.body.over == nil {
		return
	}
	select {
	case <-t.body.over:
		return
	default:
	}
	if !t.body.complete.Load() {
		_ = t.client.conn.SetReadDeadline(time.Unix(1, 0))
	}
	t.drop() // ends a Write to a guest that takes nothing
	<-t.body.over
}

// upload moves the rest of the body.
func (t *transit) upload(b *backend) error {
	c := t.client
	if !t.body.chunked && c.tcp != nil && b.tcp != nil {
		for t.body.left > spliceFrom {
			n, err := splice(b.tcp, c.tcp, min(t.body.left-spliceTail, splicePiece))
			t.conns.pulse.beat()
			t.body.left -= n
			t.proxy.metrics.received(int(n))
			if err != nil {
				return t.unspliced(err)
			}
		}
	}
	buf, out := buffers.Get(), []byte(nil)
	defer buffers.Put(buf)
	if t.body.chunked {
		out = buffers.Get()
		defer func() { buffers.Put(out[:bufferSize]) }()
	}
	for !t.body.complete.Load() {
		n, err := c.conn.Read(t.room(buf))
		t.conns.pulse.beat()
		if n == 0 && err != nil {
			return t.unread(err)
		}
		if err := t.passOn(b, &out, buf[:n]); err != nil {
			return err
		}
	}
	return nil
}

// room is the part of buf to read into: no more than the body, where its length is known.
func (t *transit) room(buf []byte) []byte {
	if t.body.chunked {
		return buf[:bufferSize-chunkMargin]
	}
	return buf[:min(int64(len(buf)), t.body.left)]
}

// passOn sends what has been read of the body. What comes after the body goes back to the client's buffer.
func (t *transit) passOn(b *backend, out *[]byte, data []byte) error {
	if !t.body.chunked {
		if t.body.left -= int64(len(data)); t.body.left == 0 {
			t.body.complete.Store(true)
		}
		t.proxy.metrics.received(len(data))
		_, err := b.Write(data)
		return err
	}
	framed, used, err := t.body.take((*out)[:0], data)
	if cap(framed) == cap(*out) {
		*out = framed
	}
	if err != nil {
		t.cut(err)
		return err
	}
	if rest := data[used:]; len(rest) > 0 {
		t.client.unread(rest)
	}
	_, err = b.Write(framed)
	return err
}

// unread ends an upload that cannot be read: the client has left, unless stopUpload made it look so.
func (t *transit) unread(err error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.cut(errClientLeft)
	}
	return err
}

// unspliced ends an upload that the kernel could not move. It does not say whose end broke: the guest's may break after
// it has answered, and the client's is only known by reading from it.
func (t *transit) unspliced(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		return t.unread(err)
	}
	var one [1]byte
	if n, readErr := t.client.conn.Read(one[:]); n == 0 && readErr != nil {
		return t.unread(readErr)
	}
	return err
}

// uploadError is an upload whose framing is broken.
type uploadError struct{ err error }

func (e *uploadError) Error() string { return e.err.Error() }
func (e *uploadError) Unwrap() error { return e.err }

// unread puts bytes of the next request into the buffer.
func (c *clientConn) unread(b []byte) {
	c.buf = append(append(c.buf[:c.end:c.end], b...), make([]byte, clientBuffer)...)
	c.end += len(b)
}

// splicers keeps what splice needs.
//
//nolint:gochecknoglobals // a cache of memory, without meaning
var splicers = sync.Pool{New: func() any { return new(io.LimitedReader) }}

// splice moves up to n bytes from one connection to the other within the kernel. Fewer without an error are
// io.ErrUnexpectedEOF: the sender has ended before.
func splice(to, from *net.TCPConn, n int64) (int64, error) {
	r, _ := splicers.Get().(*io.LimitedReader)
	r.R, r.N = from, n
	moved, err := to.ReadFrom(r)
	r.R = nil
	splicers.Put(r)
	if err == nil && moved < n {
		err = io.ErrUnexpectedEOF
	}
	return moved, err
}
