package link

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Conn is a guest stream. Read returns io.EOF where the other end has said that it sends no more, and an error that is
// syscall.ECONNRESET where the stream was cut.
type Conn interface {
	net.Conn
	// CloseWrite says that nothing more will be sent; reading goes on.
	CloseWrite() error
	// Abort closes the stream at once; the other end learns that it was cut.
	Abort()
}

// Frames of a guest stream on a shared connection, which has an end of its own but none that differs from being cut: 2
// bytes of length and as many of data; length 0 says that no more will come.
const (
	frameHead = 2
	maxFrame  = 32 << 10
)

// framed is a guest stream on a shared connection. Closing the stream below ends both directions: whoever reads then
// without having read the last frame was cut.
type framed struct {
	*stream

	// Of the reader: bytes of the head that were read, what the frame still holds, what every later Read returns.
	head    [frameHead]byte
	headLen int
	left    int
	readErr error

	mu       sync.Mutex // held by the writer
	writeErr error
}

func newFramed(s *stream) *framed { return &framed{stream: s} }

// Read reads the other end's bytes. It is for one goroutine.
func (f *framed) Read(p []byte) (int, error) {
	if f.readErr != nil || len(p) == 0 {
		return 0, f.readErr
	}
	if f.left == 0 {
		if err := f.nextFrame(); err != nil {
			return 0, err
		}
	}
	n, err := f.stream.Read(p[:min(len(p), f.left)])
	f.left -= n
	if n > 0 {
		return n, nil
	}
	return 0, f.failRead(err)
}

// nextFrame reads a frame's head. A deadline may interrupt it; the next call goes on.
func (f *framed) nextFrame() error {
	for f.headLen < frameHead {
		n, err := f.stream.Read(f.head[f.headLen:])
		f.headLen += n
		if n == 0 {
			return f.failRead(err)
		}
	}
	f.headLen = 0
	f.left = int(binary.BigEndian.Uint16(f.head[:]))
	switch {
	case f.left == 0:
		f.readErr = io.EOF
	case f.left > maxFrame:
		f.readErr = fmt.Errorf("frame of %d bytes: at most %d are allowed: %w", f.left, maxFrame, syscall.ECONNRESET)
	}
	return f.readErr
}

func (f *framed) failRead(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
		return err
	}
	f.readErr = &net.OpError{Op: "read", Net: "link", Source: f.LocalAddr(), Addr: f.RemoteAddr(), Err: syscall.ECONNRESET}
	return f.readErr
}

// frames are buffers of one frame.
var frames = sync.Pool{New: func() any { return new([frameHead + maxFrame]byte) }} //nolint:gochecknoglobals // a pool of buffers

// Write sends p. After an error, a deadline's too, nothing more can be sent: a part of a frame may have gone.
func (f *framed) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	buf := frames.Get().(*[frameHead + maxFrame]byte) //nolint:errcheck,forcetypeassert // nothing else is in it
	defer frames.Put(buf)
	sent := 0
	for sent < len(p) && f.writeErr == nil {
		n := copy(buf[frameHead:], p[sent:])
		if f.writeLocked(buf, n) == nil {
			sent += n
		}
	}
	return sent, f.writeErr
}

// ReadFrom sends all that r has.
func (f *framed) ReadFrom(r io.Reader) (int64, error) {
	buf := frames.Get().(*[frameHead + maxFrame]byte) //nolint:errcheck,forcetypeassert // nothing else is in it
	defer frames.Put(buf)
	var sent int64
	for {
		n, err := r.Read(buf[frameHead:])
		if n > 0 {
			f.mu.Lock()
			failed := f.writeErr
			if failed == nil {
				failed = f.writeLocked(buf, n)
			}
			f.mu.Unlock()
			if failed != nil {
				return sent, failed
			}
			sent += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
	}
}

// writeLocked sends a frame of n bytes that are in their place in buf.
//
// Preconditions: f.mu is held, f.writeErr is nil.
func (f *framed) writeLocked(buf *[frameHead + maxFrame]byte, n int) error {
	binary.BigEndian.PutUint16(buf[:], uint16(n)) //nolint:gosec // at most maxFrame
	_, err := f.stream.Write(buf[:frameHead+n])
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		f.writeErr = err
	case err != nil:
		f.writeErr = &net.OpError{Op: "write", Net: "link", Source: f.LocalAddr(), Addr: f.RemoteAddr(), Err: syscall.ECONNRESET}
	}
	return f.writeErr
}

// CloseWrite sends the last frame.
func (f *framed) CloseWrite() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writeErr != nil {
		return f.writeErr
	}
	var last [frameHead + maxFrame]byte
	if err := f.writeLocked(&last, 0); err != nil {
		return err
	}
	f.writeErr = net.ErrClosed
	return nil
}

// Abort closes the stream.
func (f *framed) Abort() { _ = f.Close() }

// gone blocks until the other end has closed the stream, or this one has.
//
// Preconditions: Read has returned io.EOF.
func (f *framed) gone() {
	_ = f.SetReadDeadline(time.Time{})
	var one [1]byte
	_, _ = f.stream.Read(one[:]) // nothing may follow the last frame: whatever it is, it is over
}

// direct is a guest stream that is a TLS connection of its own. TLS tells its end from being cut.
type direct struct{ *tls.Conn }

// Read reads the other end's bytes.
func (d direct) Read(p []byte) (int, error) {
	n, err := d.Conn.Read(p)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = &net.OpError{Op: "read", Net: "tcp", Source: d.LocalAddr(), Addr: d.RemoteAddr(), Err: syscall.ECONNRESET}
	}
	return n, err
}

// Abort closes the connection with what was not sent thrown away.
func (d direct) Abort() { abort(d.NetConn()) }

// abort closes a connection so that the other end, where it can, learns that it was cut.
func abort(c net.Conn) {
	if a, ok := c.(interface{ Abort() }); ok {
		a.Abort()
		return
	}
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0) // it closes all the same
	}
	_ = c.Close()
}
