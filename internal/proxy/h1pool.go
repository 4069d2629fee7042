package proxy

import (
	"net"
	"sync"
	"time"
)

// pool keeps the unused connections of the fast path to one sandbox, by port. The one used last is used next, so that
// those which too many requests at a time have left behind become idle and go.
type pool struct {
	mu     sync.Mutex
	idle   map[uint16][]*backend // the longest unused first
	total  int
	timer  *time.Timer // set while anything is idle
	closed bool
}

// backend is a connection of the fast path to a port in a sandbox. It is used by one request at a time.
type backend struct {
	net.Conn
	since time.Time // when it became idle
}

func newPool() *pool { return &pool{idle: make(map[uint16][]*backend)} }

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
		for _, b := range all {
			_ = b.Close()
		}
	}
}
