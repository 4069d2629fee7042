package proxy

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"
)

// watchAfter is how long a request may take before somebody looks whether its client is still there. Looking costs a
// goroutine and three system calls, which most requests are too short for.
const watchAfter = 20 * time.Millisecond

// watch looks whether a client leaves while its request is open.
type watch struct {
	cancel context.CancelCauseFunc // of the connection's context

	mu       sync.Mutex
	timer    *time.Timer
	request  *transit // nil: nothing to watch
	over     chan struct{}
	stopping bool
}

// lookOut begins to watch; nobody may read from the client until lookAway. Bytes of a next request that are there already
// hide a client's end.
func (c *clientConn) lookOut(t *transit) {
	if c.next < c.end || c.end == len(c.buf) {
		return
	}
	w := &c.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	w.request = t
	if w.timer == nil {
		w.timer = time.AfterFunc(watchAfter, c.look)
		return
	}
	w.timer.Reset(watchAfter)
}

// look reads one byte from the client, or its end.
func (c *clientConn) look() {
	w := &c.watch
	w.mu.Lock()
	t := w.request
	if t == nil || w.over != nil {
		w.mu.Unlock()
		return
	}
	over := make(chan struct{})
	w.over = over
	c.setDeadline(time.Time{})
	w.mu.Unlock()

	defer close(over)
	n, err := c.conn.Read(c.buf[c.end : c.end+1])
	w.mu.Lock()
	c.end += n
	expected := n > 0 || w.stopping && errors.Is(err, os.ErrDeadlineExceeded)
	w.mu.Unlock()
	if !expected && err != nil {
		w.cancel(errClientLeft)
		t.cut(errClientLeft)
	}
}

// lookAway ends the watch; the client's buffer is the caller's again.
func (c *clientConn) lookAway() {
	w := &c.watch
	w.mu.Lock()
	w.request = nil
	over := w.over
	if over == nil {
		w.mu.Unlock()
		return
	}
	w.stopping = true
	_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	w.mu.Unlock()
	<-over
	w.mu.Lock()
	w.over, w.stopping = nil, false
	w.mu.Unlock()
	c.setDeadline(time.Time{})
}
