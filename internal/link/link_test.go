package link_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestCallsBothWays(t *testing.T) {
	r := newRig(t)
	l, _ := r.link(nodeA, link.Handlers{RPC: rpcOf("node")})
	for range 3 {
		if got, err := get(t.Context(), l.HTTPClient(), ""); err != nil || got != "server for node/nodeaa" {
			t.Errorf("the node's call: %q, %v", got, err)
		}
		if got, err := get(t.Context(), r.hub.NodeClient("nodeaa"), ""); err != nil || got != "node for server/" {
			t.Errorf("the server's call: %q, %v", got, err)
		}
	}
	_, err := get(t.Context(), r.hub.NodeClient("nodeaa"), "missing")
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("an error of a handler: %v; want it with its code", err)
	}
	if _, err := get(t.Context(), r.hub.NodeClient("nodebb"), ""); !errors.Is(err, sandbox.ErrUnavailable) || connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a call to a node without a link: %v; want unavailable", err)
	}
}

func TestPeerIsTold(t *testing.T) {
	r := newRig(t)
	_, stop := r.link(nodeA, link.Handlers{})
	p := <-r.up
	if p.Member != nodeA || p.Remote.Addr().String() != "127.0.0.1" || p.Since.IsZero() {
		t.Errorf("up: %+v", p)
	}
	if all := r.hub.Peers(); len(all) != 1 || all[0] != p {
		t.Errorf("peers: %+v", all)
	}
	stop()
	if got := <-r.down; got != p {
		t.Errorf("down: %+v; want %+v", got, p)
	}
	if r.hub.Connected(nodeA) {
		t.Error("a link is still there")
	}
}

// TestReplacedLink lets a second process with the same certificate in; the first one's calls end.
func TestReplacedLink(t *testing.T) {
	r := newRig(t)
	_, stop := r.link(nodeA, link.Handlers{RPC: rpcOf("first")})
	first := <-r.up
	second := r.unlinked(nodeA, link.Handlers{RPC: rpcOf("second")})
	run(t, second.Run)
	if got := <-r.down; got != first {
		t.Errorf("down: %+v; want %+v", got, first)
	}
	<-r.up
	stop()
	r.wait("a call to the second", func() bool {
		got, err := get(t.Context(), r.hub.NodeClient("nodeaa"), "")
		return err == nil && got == "second for server/"
	})
}

func TestServerRestarts(t *testing.T) {
	r := newRig(t)
	l, _ := r.link(nodeA, link.Handlers{RPC: rpcOf("node")})
	for range 3 {
		r.stop()
		r.wait("the link's end", func() bool { return !l.Connected() })
		if _, err := get(t.Context(), l.HTTPClient(), ""); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("a call without a server: %v; want ErrUnavailable", err)
		}
		r.serve(r.addr)
		r.wait("the link's return", func() bool { return link.Ready(l) && link.HubReady(r.hub, nodeA) })
		if _, err := get(t.Context(), l.HTTPClient(), ""); err != nil {
			t.Errorf("after a restart: %v", err)
		}
		if _, err := get(t.Context(), r.hub.NodeClient("nodeaa"), ""); err != nil {
			t.Errorf("after a restart: %v", err)
		}
	}
}

// TestDroppedLink takes a member's link away; it comes back by itself unless it is refused.
func TestDroppedLink(t *testing.T) {
	r := newRig(t)
	l, _ := r.link(nodeA, link.Handlers{RPC: rpcOf("node")})
	<-r.up
	r.hub.Drop(nodeA)
	<-r.down
	<-r.up
	r.wait("calls", func() bool { _, err := get(t.Context(), l.HTTPClient(), ""); return err == nil })
}

// TestStrangers have no certificate of the cluster, or none at all.
func TestStrangers(t *testing.T) {
	r := newRig(t)
	other := newRig(t)
	foreign := link.New(link.Config{
		Self: nodeA, Servers: func() []string { return []string{r.addr} }, TLS: other.identity(nodeA).ClientTLS, Logger: logger(),
	})
	run(t, foreign.Run)
	r.wait("a refusal", func() bool { return foreign.Err() != nil && strings.Contains(foreign.Err().Error(), "tls:") })

	nobody := r.identity(nodeA).ClientTLS(server)
	nobody.Certificates, nobody.NextProtos = nil, []string{"cloister-link/1"}
	c, err := (&tls.Dialer{Config: nobody}).DialContext(t.Context(), "tcp", r.addr)
	if err == nil {
		_, err = c.Read(make([]byte, 1)) // TLS 1.3 tells the client after its handshake
		_ = c.Close()
	}
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a link without a certificate: %v; want a TLS error", err)
	}
	if len(r.hub.Peers()) != 0 {
		t.Errorf("peers: %v; want none", r.hub.Peers())
	}
}

// TestJoinNeedsNoCertificate asks over HTTP, with nothing but trust in the server.
func TestJoinNeedsNoCertificate(t *testing.T) {
	r := newRig(t)
	conf := r.identity(nodeA).ClientTLS(server)
	conf.Certificates = nil
	transport := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+r.addr+"/", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "joined" || resp.ProtoMajor != 2 {
		t.Errorf("HTTP/%d: %q, %v; want joined over HTTP/2", resp.ProtoMajor, body, err)
	}
}

// TestStalledBulk fills the bulk connection with what nobody reads; calls go on.
func TestStalledBulk(t *testing.T) {
	r := newRig(t)
	l, _ := r.link(nodeA, tcpGuest(t, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, c) // until the stream is cut
	}))
	deaf := link.Handlers{RPC: rpcOf("deaf"), Guest: func(context.Context, sandbox.Member, sandbox.ID, uint16) (net.Conn, error) {
		near, far := net.Pipe() // whose reader never comes
		t.Cleanup(func() { _ = far.Close() })
		return near, nil
	}}
	_, _ = r.link(nodeB, deaf)
	for range 8 {
		c, err := r.hub.Open(t.Context(), link.GuestHead("nodebb", box, 80))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Write(make([]byte, 64<<20)); !errors.Is(err, syscall.ETIMEDOUT) && !isTimeout(err) {
			t.Errorf("writing to who does not read: %v; want a timeout", err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for range 100 {
		if _, err := get(ctx, r.hub.NodeClient("nodebb"), ""); err != nil {
			t.Fatal(err)
		}
		if _, err := get(ctx, l.HTTPClient(), ""); err != nil {
			t.Fatal(err)
		}
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestBulkComesBack breaks the bulk connection alone: the next stream waits for another, and the link stays.
func TestBulkComesBack(t *testing.T) {
	r := newRig(t)
	l, _ := r.link(nodeA, tcpGuest(t, echo))
	for range 5 {
		link.CutBulk(r.hub, nodeA)
		c, err := r.hub.Open(t.Context(), link.GuestHead("nodeaa", box, 80))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	if len(r.up) != 1 || len(r.down) != 0 || !l.Connected() {
		t.Errorf("%d times up, %d times down; want the link to have stayed", len(r.up), len(r.down))
	}
}
