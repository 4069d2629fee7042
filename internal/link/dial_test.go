package link_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// waiting is a member's link that waits for a server at an address.
type waiting struct {
	*link.Link

	at string
	// came is told of each connection.
	came <-chan struct{}
	stop func()
}

// awaiting returns a link that waits. addr may be that of one that has ended.
func (r *rig) awaiting(m sandbox.Member, addr string) waiting {
	r.tb.Helper()
	own := r.identity(m)
	l := link.New(link.Config{Self: m, AwaitTLS: own.ServerTLS(), Identify: auth.MemberOf, Logger: logger()})
	ln := counted{listen(r.tb, addr), make(chan struct{}, 1000)}
	return waiting{l, ln.Addr().String(), ln.came, run(r.tb, func(ctx context.Context) error { return l.Await(ctx, ln) })}
}

// counted is a listener that tells of each connection.
type counted struct {
	net.Listener

	came chan struct{}
}

func (c counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.came <- struct{}{}
	}
	return conn, err
}

// dials has the hub keep the link of a proxy at an address.
func (r *rig) dials(h *link.Hub, at string) (stop func()) {
	return run(r.tb, func(ctx context.Context) error { return h.Dial(ctx, sandbox.RoleProxy, at) })
}

// TestDialedLink has the server make the link: calls and guests go as over one that the member has made, and either end may
// start anew.
func TestDialedLink(t *testing.T) {
	r := newRig(t)
	r.link(nodeA, tcpGuest(t, echo))
	<-r.up
	l := r.awaiting(proxyP, "127.0.0.1:0")
	works := func(when string) {
		t.Helper()
		r.wait("the link "+when, func() bool { return link.Ready(l.Link) && link.HubReady(r.hub, proxyP) })
		if got, err := get(t.Context(), l.HTTPClient(), ""); err != nil || got != "server for proxy/proxyp" {
			t.Errorf("%s: the proxy's call: %q, %v", when, got, err)
		}
		c, err := l.Open(t.Context(), link.GuestHead("nodeaa", box, 80))
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		defer func() { _ = c.Close() }()
		back := make([]byte, 5)
		if _, err := io.WriteString(c, "hello"); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(c, back); err != nil || string(back) != "hello" {
			t.Errorf("%s: a guest by way of the server: %q, %v", when, back, err)
		}
	}
	stop := r.dials(r.hub, l.at)
	works("at first")
	if p := <-r.up; p.Member != proxyP || p.Dialed != l.at || p.Remote.String() != l.at {
		t.Errorf("up: %+v", p)
	}
	link.CutBulk(r.hub, proxyP)
	works("with another bulk connection")
	r.hub.Drop(proxyP)
	<-r.down
	<-r.up
	works("after it was dropped")
	stop()
	r.wait("its end", func() bool { return !l.Connected() && !r.hub.Connected(proxyP) })
	<-r.down
	r.dials(r.hub, l.at)
	works("with the server's next life")
	l.stop()
	<-r.down
	l = r.awaiting(proxyP, l.at)
	works("with the proxy's next life")
}

// TestMadeTwice keeps a member that has a link from getting another one in another way.
func TestMadeTwice(t *testing.T) {
	r := newRig(t)
	first := r.awaiting(proxyP, "127.0.0.1:0")
	second := r.awaiting(proxyP, "127.0.0.1:0")
	r.dials(r.hub, first.at)
	r.wait("the first", func() bool { return link.Ready(first.Link) && link.HubReady(r.hub, proxyP) })
	<-first.came
	<-first.came
	for _, refused := range []struct {
		how string
		try func()
	}{
		{"dialed by two names", func() {
			r.dials(r.hub, second.at)
			<-second.came
			<-second.came // the first attempt is over
		}},
		{"dialing too", func() {
			l := r.unlinked(proxyP, link.Handlers{})
			run(t, l.Run)
			r.wait("a refusal", func() bool { return errors.Is(l.Err(), sandbox.ErrConflict) })
		}},
		{"of another server", func() {
			own := r.identity(sandbox.Member{Role: sandbox.RoleServer, ID: "second"})
			h := link.NewHub(link.HubConfig{TLS: own.ServerTLS(), ClientTLS: own.ClientTLS, Identify: auth.MemberOf, Logger: logger()})
			r.dials(h, first.at)
			<-first.came
			<-first.came
		}},
	} {
		refused.try()
		if len(r.up) != 1 || len(r.down) != 0 || second.Connected() || !first.Connected() {
			t.Errorf("%s: %d times up, %d times down; want the first to have stayed", refused.how, len(r.up), len(r.down))
		}
	}
}

// TestWhoMayDial has others than servers dial a member that waits, and a server dial somebody else.
func TestWhoMayDial(t *testing.T) {
	r := newRig(t)
	l := r.awaiting(proxyP, "127.0.0.1:0")
	for name, conf := range map[string]*tls.Config{
		"a node": r.identity(nodeA).ClientTLS(proxyP), "a stranger": newRig(t).identity(server).ClientTLS(proxyP),
	} {
		conf.NextProtos = []string{"cloister-link/1"}
		conf.InsecureSkipVerify = true // it is the other end that is looked at
		conf.VerifyConnection = nil
		c, err := (&tls.Dialer{Config: conf}).DialContext(t.Context(), "tcp", l.at)
		if err == nil {
			_, _ = c.Write(make([]byte, 16))
			answer := make([]byte, 1)
			if _, err = io.ReadFull(c, answer); err == nil && answer[0] == 0 {
				t.Errorf("%s made a link", name)
			}
			_ = c.Close()
		}
	}
	node := r.awaiting(nodeB, "127.0.0.1:0")
	r.dials(r.hub, node.at)
	<-node.came
	<-node.came
	if l.Connected() || node.Connected() || len(r.hub.Peers()) != 0 {
		t.Errorf("peers: %v; want none", r.hub.Peers())
	}
}
