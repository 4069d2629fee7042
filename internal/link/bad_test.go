package link_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestNonsense says what is no head to a node, and what is no hello to a server.
func TestNonsense(t *testing.T) {
	r := newRig(t)
	to := r.direct(nodeA, tcpGuest(t, echo))
	conf := r.identity(proxyP).ClientTLS(nodeA)
	conf.NextProtos = []string{"cloister-node/1"}
	for _, text := range []string{"\x03\x02\x01\x00", "\x00", "GET / HTTP/1.1\r\n\r\n" + string(make([]byte, 300))} {
		c, err := (&tls.Dialer{Config: conf}).DialContext(t.Context(), "tcp", to.Address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		if answer, _ := io.ReadAll(c); len(answer) < 5 || answer[0] != 1 {
			t.Errorf("%q was answered %q; want an error", text, answer)
		}
		_ = c.Close()
	}
	// A link that was greeted with too little simply ends; others go on.
	hub := r.identity(nodeB).ClientTLS(server)
	hub.NextProtos = []string{"cloister-link/1"}
	c, err := (&tls.Dialer{Config: hub}).DialContext(t.Context(), "tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "short")
	_ = c.Close()
	r.link(nodeB, link.Handlers{})
}

// TestBulkOfNoLink offers a bulk connection that belongs to no link.
func TestBulkOfNoLink(t *testing.T) {
	r := newRig(t)
	conf := r.identity(nodeB).ClientTLS(server)
	conf.NextProtos = []string{"cloister-bulk/1"}
	c, err := (&tls.Dialer{Config: conf}).DialContext(t.Context(), "tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if answer, _ := io.ReadAll(c); len(answer) < 5 || answer[0] != 1 {
		t.Errorf("answered %q; want an error", answer)
	}
}

// freezer passes bytes between two TCP connections until it is frozen: then it takes and acknowledges nothing of what is said,
// as a stopped process or a cut wire does.
type freezer struct {
	addr string

	mu     sync.Mutex
	frozen chan struct{}
}

func newFreezer(t *testing.T, to func() string) *freezer {
	t.Helper()
	ln := listen(t, "127.0.0.1:0")
	f := &freezer{addr: ln.Addr().String(), frozen: make(chan struct{})}
	var passing sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	pass := func(dst, src net.Conn) {
		defer func() { _ = dst.Close() }()
		defer context.AfterFunc(ctx, func() { _ = src.Close() })()
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			select {
			case <-f.stopped():
				<-ctx.Done()
				return
			default:
			}
			if err != nil {
				return
			}
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
	}
	passing.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := (&net.Dialer{}).DialContext(ctx, "tcp", to())
			if err != nil {
				_ = near.Close()
				continue
			}
			passing.Go(func() { pass(far, near) })
			passing.Go(func() { pass(near, far) })
		}
	})
	t.Cleanup(func() { cancel(); _ = ln.Close(); passing.Wait() })
	return f
}

func (f *freezer) stopped() chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frozen
}

func (f *freezer) freeze() { close(f.stopped()) }

// TestSilentPeer stops everything between a member and the server without ending a connection: both ends notice.
func TestSilentPeer(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	f := newFreezer(t, func() string { return r.addr })
	l := link.New(link.Config{
		Self: nodeA, Servers: func() []string { return []string{f.addr} }, TLS: r.identity(nodeA).ClientTLS,
		Handlers: tcpGuest(t, echo), Logger: logger(),
	})
	run(t, l.Run)
	r.wait("the link", func() bool { return link.Ready(l) && link.HubReady(r.hub, nodeA) })
	c, err := r.hub.Open(t.Context(), link.GuestHead("nodeaa", box, 80))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	f.freeze()
	r.wait("both ends to notice", func() bool { return !l.Connected() && !r.hub.Connected(nodeA) })
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a guest stream of a link that is gone: %v; want it cut", err)
	}
	if _, err := r.hub.Open(t.Context(), link.GuestHead("nodeaa", box, 80)); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("a stream to who is gone: %v; want ErrUnavailable", err)
	}
}
