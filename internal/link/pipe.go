package link

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
)

// copies are buffers that bytes pass through from one connection to the other.
var copies = sync.Pool{New: func() any { return new([maxFrame]byte) }} //nolint:gochecknoglobals // a pool of buffers

// Pipe copies both ways between two connections until both ends have said that they send no more, or either is cut, which
// cuts the other. It closes both.
func Pipe(a, b net.Conn) {
	var once sync.Once
	cut := func() { once.Do(func() { abort(a); abort(b) }) }
	var copying, watching sync.WaitGroup
	oneWay := func(dst, src net.Conn) {
		if passOn(dst, src) != nil {
			cut()
			return
		}
		if s, ok := src.(interface{ gone() }); ok {
			watching.Go(func() { s.gone(); cut() }) // nobody is left who would read what still comes the other way
		}
	}
	copying.Go(func() { oneWay(a, b) })
	oneWay(b, a)
	copying.Wait()
	once.Do(func() { _ = a.Close(); _ = b.Close() }) // both ends have been told already
	watching.Wait()
}

// passOn copies from src to dst until src ends, and says so to dst.
func passOn(dst, src net.Conn) error {
	if err := copyAll(dst, src); err != nil {
		return err
	}
	if c, ok := dst.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return io.ErrClosedPipe // it has no halves: what src says is over is over as a whole
}

// copyAll copies until src ends; between two TCP connections the kernel does it.
func copyAll(dst, src net.Conn) error {
	to, from := tcpOf(dst), tcpOf(src)
	if to != nil && from != nil {
		_, err := to.ReadFrom(from)
		return err
	}
	if f, ok := dst.(*framed); ok {
		_, err := f.ReadFrom(src)
		return err
	}
	buf := copies.Get().(*[maxFrame]byte) //nolint:errcheck,forcetypeassert // nothing else is in it
	defer copies.Put(buf)
	_, err := io.CopyBuffer(onlyWriter{dst}, onlyReader{src}, buf[:])
	return err
}

// onlyWriter and onlyReader hide short cuts that would allocate a buffer of their own.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)

// tcpOf returns the TCP connection that c is or that it merely watches over; nil where c is something else.
func tcpOf(c net.Conn) *net.TCPConn {
	switch c := c.(type) {
	case *net.TCPConn:
		return c
	case *tls.Conn, direct:
		return nil // what is below carries other bytes
	case interface{ NetConn() net.Conn }:
		tcp, _ := c.NetConn().(*net.TCPConn)
		return tcp
	}
	return nil
}

// splice copies both ways between two shared connections' streams without looking at what passes. Their end is the end of
// both directions.
func splice(a, b net.Conn) {
	var copying sync.WaitGroup
	oneWay := func(dst, src net.Conn) {
		buf := copies.Get().(*[maxFrame]byte) //nolint:errcheck,forcetypeassert // nothing else is in it
		defer copies.Put(buf)
		_, _ = io.CopyBuffer(onlyWriter{dst}, onlyReader{src}, buf[:]) // whatever ended it, it is over
		_ = dst.Close()
		_ = src.Close()
	}
	copying.Go(func() { oneWay(a, b) })
	oneWay(b, a)
	copying.Wait()
}
