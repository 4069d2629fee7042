package proxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The pieces in which bodies are moved. Larger ones no longer raise the throughput on loopback.
const (
	bufferSize       = 64 << 10
	streamBufferSize = 16 << 10
)

//nolint:gochecknoglobals // caches of memory, without meaning
var (
	buffers       largeBuffers
	streamBuffers smallBuffers
)

// largeBuffers keeps buffers of bufferSize. What is kept are arrays: a slice cannot be kept without allocating.
type largeBuffers struct{ pool sync.Pool }

// Get returns a buffer.
func (p *largeBuffers) Get() []byte {
	if b, ok := p.pool.Get().(*[bufferSize]byte); ok {
		return b[:]
	}
	return make([]byte, bufferSize)
}

// Put takes a buffer of Get back.
func (p *largeBuffers) Put(b []byte) { p.pool.Put((*[bufferSize]byte)(b)) }

// smallBuffers keeps buffers of streamBufferSize, likewise.
type smallBuffers struct{ pool sync.Pool }

// Get returns a buffer.
func (p *smallBuffers) Get() []byte {
	if b, ok := p.pool.Get().(*[streamBufferSize]byte); ok {
		return b[:]
	}
	return make([]byte, streamBufferSize)
}

// Put takes a buffer of Get back.
func (p *smallBuffers) Put(b []byte) { p.pool.Put((*[streamBufferSize]byte)(b)) }

// errSandboxEnded says that a sandbox ended while a request to it was open.
var errSandboxEnded = errors.New("the sandbox ended")

// guestConn is a connection to a guest. It tells the request that uses it when the connection breaks, and whether the
// node closed it, which means that the sandbox has ended, or anybody else.
type guestConn struct {
	net.Conn
	pulse  *pulse
	closed atomic.Bool // by us
	wrote  atomic.Bool // something of the present request
	user   atomic.Pointer[exchange]
}

func (c *guestConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.pulse.beat()
	}
	if err != nil {
		err = c.broke(err)
	}
	return n, err
}

func (c *guestConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if n > 0 {
		c.wrote.Store(true)
		c.pulse.beat()
	}
	if err != nil {
		err = c.broke(err)
	}
	return n, err
}

// ReadFrom moves an upload in larger pieces than io.Copy would.
func (c *guestConn) ReadFrom(r io.Reader) (int64, error) {
	buf := buffers.Get()
	defer buffers.Put(buf)
	return io.CopyBuffer(onlyWriter{c}, r, buf)
}

// Close is called by whoever uses the connection, never by the node.
func (c *guestConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// CloseWrite ends the sending direction, where the connection can.
func (c *guestConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

func (c *guestConn) broke(err error) error {
	if c.closed.Load() {
		return err
	}
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, sandbox.ErrNotFound) {
		err = errors.Join(errSandboxEnded, err)
	}
	if ex := c.user.Load(); ex != nil {
		ex.guestBroke(err)
	}
	return err
}

// onlyWriter hides every method but Write.
type onlyWriter struct{ io.Writer }
