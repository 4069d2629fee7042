package proxy

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// pool keeps the unused connections of the fast path to one sandbox, by port. The one used last is used next, so that
// those which too many requests at a time have left behind become idle and go.
type pool struct {
	mu     sync.Mutex
	idle   map[uint16][]*backend // the longest unused first
	total  int
	timer  *time.Timer // runs while anything is idle
	closed bool
}

func newPool() *pool { return &pool{idle: make(map[uint16][]*backend)} }

// get returns a connection that has not been closed by the guest, as far as this machine knows; nil if there is none.
func (p *pool) get(port uint16) *backend {
	for {
		b := p.pop(port)
		if b == nil || b.wake() {
			return b
		}
		_ = b.Close()
	}
}

func (p *pool) pop(port uint16) *backend {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.idle[port]
	if len(all) == 0 {
		return nil
	}
	b := all[len(all)-1]
	all[len(all)-1] = nil
	p.idle[port] = all[:len(all)-1]
	p.total--
	return b
}

// put takes a connection back, or closes it where there are enough.
func (p *pool) put(port uint16, b *backend) {
	b.rest()
	p.mu.Lock()
	keep := !p.closed && p.total < maxIdlePerSandbox && len(p.idle[port]) < maxIdlePerPort
	if keep {
		p.idle[port] = append(p.idle[port], b)
		if p.total++; p.timer == nil {
			p.timer = time.AfterFunc(idleConnTimeout, p.expire)
		}
	}
	p.mu.Unlock()
	if !keep {
		_ = b.Close()
	}
}

// expire closes what has been idle for too long.
func (p *pool) expire() {
	var old []*backend
	p.mu.Lock()
	limit := time.Now().Add(-idleConnTimeout)
	for port, all := range p.idle {
		n := 0
		for n < len(all) && all[n].since.Before(limit) {
			n++
		}
		old = append(old, all[:n]...)
		if p.idle[port] = append([]*backend(nil), all[n:]...); n == len(all) {
			delete(p.idle, port)
		}
		p.total -= n
	}
	p.timer = nil
	if p.total > 0 {
		p.timer = time.AfterFunc(idleConnTimeout/4, p.expire)
	}
	p.mu.Unlock()
	closeAll(old)
}

// close closes what is idle, now and whenever it becomes so.
func (p *pool) close() {
	p.mu.Lock()
	idle := p.idle
	p.idle, p.total, p.closed = nil, 0, true
	if p.timer != nil {
		p.timer.Stop()
	}
	p.mu.Unlock()
	for _, all := range idle {
		closeAll(all)
	}
}

func closeAll(all []*backend) {
	for _, b := range all {
		_ = b.Close()
	}
}

// backend is a connection of the fast path to a port in a sandbox. It is used by one request at a time.
type backend struct {
	net.Conn
	tcp   *net.TCPConn    // what Conn is, or is nothing but a name for; nil for anything else
	raw   syscall.RawConn // likewise
	since time.Time       // when it became idle

	spoke bool // while it was idle: something came, or its end
	probe [1]byte
	look  func(fd uintptr) bool
	over  chan struct{} // of a guard, where there is no raw
}

func newBackend(c net.Conn) *backend {
	b := &backend{Conn: c, tcp: plainTCP(c)}
	if b.tcp == nil {
		return b
	}
	raw, err := b.tcp.SyscallConn()
	if err != nil {
		b.tcp = nil // closed already; the first use of it tells
		return b
	}
	b.raw = raw
	b.look = func(fd uintptr) bool {
		_, err := syscall.Read(int(fd), b.probe[:])
		b.spoke = !errors.Is(err, syscall.EAGAIN)
		return true
	}
	return b
}

// plainTCP returns the TCP connection that c is, or that it only accompanies. A connection that encrypts has one below
// it too, but not one that shows its descriptor.
func plainTCP(c net.Conn) *net.TCPConn {
	if tcp, ok := c.(*net.TCPConn); ok {
		return tcp
	}
	wrapper, ok := c.(interface {
		syscall.Conn
		NetConn() net.Conn
	})
	if !ok {
		return nil
	}
	tcp, _ := wrapper.NetConn().(*net.TCPConn)
	return tcp
}

// rest begins the time between two requests.
func (b *backend) rest() {
	b.since = time.Now()
	if b.raw == nil {
		b.over = make(chan struct{})
		go b.guard(b.over)
	}
}

// guard waits for the end of a connection of which only a Read tells.
func (b *backend) guard(over chan struct{}) {
	defer close(over)
	_, err := b.Read(b.probe[:])
	if b.spoke = !errors.Is(err, os.ErrDeadlineExceeded); b.spoke {
		_ = b.Close()
	}
}

// wake ends rest and reports whether the connection is as it was left: a guest has nothing to say between two requests.
func (b *backend) wake() bool {
	if b.raw != nil {
		return b.raw.Read(b.look) == nil && !b.spoke
	}
	_ = b.SetReadDeadline(time.Unix(1, 0))
	<-b.over
	return !b.spoke && b.SetReadDeadline(time.Time{}) == nil
}

// halfClose ends the sending direction of c, where it has such a thing.
func halfClose(c net.Conn) {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // the peer that is gone needs no end
		return
	}
	_ = c.Close()
}
