package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
)

// switchProtocol joins client and guest once the guest has agreed to another protocol, until both have ended.
func (t *transit) switchProtocol() error {
	c, h := t.client, &t.head
	if !t.upgrades() || !h.Upgrade || !bytes.EqualFold(h.Protocol, c.head.Protocol) {
		return errors.New("the guest switched to a protocol that the client did not ask for")
	}
	c.lookAway()
	c.setDeadline(time.Time{})
	t.aborted = true // the connection has no further use
	t.outcome.status = http.StatusSwitchingProtocols
	out := h1.AppendFields(appendStatus(c.out[:0], h), h.Fields)
	out = h1.AppendField(append(out, "Connection: Upgrade\r\n"...), "Upgrade", h.Protocol)
	out = append(append(out, "\r\n"...), t.in[t.from:t.to]...)
	if err := t.write(out, t.to-t.from); err != nil {
		return nil //nolint:nilerr // the client has left, which ends this as well as any other way
	}
	b := t.backend
	over := make(chan struct{})
	go func() {
		defer close(over)
		first := c.buf[c.next:c.end]
		_, err := b.Write(first)
		t.proxy.metrics.received(len(first))
		if err == nil {
			err = pipe(b.Conn, c.conn, t.counted(t.proxy.metrics.received))
		}
		if err != nil {
			t.cut(errClientLeft)
		}
	}()
	if pipe(c.conn, b.Conn, t.counted(t.proxy.metrics.sent)) != nil {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
		t.drop()
	}
	<-over
	return nil
}

// counted counts bytes, and that there were some.
func (t *transit) counted(count func(int)) func(int) {
	return func(n int) {
		t.conns.pulse.beat()
		count(n)
	}
}

// pipe moves bytes until their end, which it passes on.
func pipe(to, from net.Conn, count func(int)) error {
	buf := streamBuffers.Get()
	defer streamBuffers.Put(buf)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
			count(n)
		}
		if errors.Is(err, io.EOF) {
			halfClose(to)
			return nil
		}
		if err != nil {
			return err
		}
	}
}
