package link_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// way is one of the ways to a node's guests.
type way struct {
	name string
	// open sets the way up for a node with these handlers and returns what opens streams.
	open func(t *testing.T, r *rig, h link.Handlers) func(ctx context.Context, port uint16) (net.Conn, error)
}

func ways() []way {
	return []way{
		{"from the server", func(_ *testing.T, r *rig, h link.Handlers) func(context.Context, uint16) (net.Conn, error) {
			r.link(nodeA, h)
			return func(ctx context.Context, port uint16) (net.Conn, error) {
				return r.hub.Open(ctx, link.GuestHead("nodeaa", box, port))
			}
		}},
		{"relayed", func(_ *testing.T, r *rig, h link.Handlers) func(context.Context, uint16) (net.Conn, error) {
			r.link(nodeA, h)
			p, _ := r.link(proxyP, link.Handlers{})
			return func(ctx context.Context, port uint16) (net.Conn, error) {
				return p.Open(ctx, link.GuestHead("nodeaa", box, port))
			}
		}},
		{"relayed to the server's own node", func(_ *testing.T, r *rig, h link.Handlers) func(context.Context, uint16) (net.Conn, error) {
			r.hub.AddLocal("nodeaa", h)
			p, _ := r.link(proxyP, link.Handlers{})
			return func(ctx context.Context, port uint16) (net.Conn, error) {
				return p.Open(ctx, link.GuestHead("nodeaa", box, port))
			}
		}},
		{"direct", func(_ *testing.T, r *rig, h link.Handlers) func(context.Context, uint16) (net.Conn, error) {
			to, reach := r.direct(nodeA, h), r.reach(proxyP, nil)
			return func(ctx context.Context, port uint16) (net.Conn, error) {
				return reach.Dial(ctx, to, link.GuestHead("", box, port))
			}
		}},
		{"within the process", func(_ *testing.T, r *rig, h link.Handlers) func(context.Context, uint16) (net.Conn, error) {
			r.hub.AddLocal("nodeaa", h)
			reach := r.reach(server, r.hub)
			return func(ctx context.Context, port uint16) (net.Conn, error) {
				return reach.Dial(ctx, link.Endpoint{Node: "nodeaa"}, link.GuestHead("", box, port))
			}
		}},
	}
}

// everyWay runs a test with a stream to a guest over each way.
func everyWay(t *testing.T, guest func(*net.TCPConn), test func(t *testing.T, c net.Conn)) {
	t.Helper()
	for _, w := range ways() {
		t.Run(w.name, func(t *testing.T) {
			c, err := w.open(t, newRig(t), tcpGuest(t, guest))(t.Context(), 80)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			test(t, c)
		})
	}
}

// TestGuestBytes sends both ways at once, more than any buffer holds.
func TestGuestBytes(t *testing.T) {
	const size = 8 << 20
	everyWay(t, echo, func(t *testing.T, c net.Conn) {
		t.Helper()
		sent, got := sha256.New(), sha256.New()
		var sending sync.WaitGroup
		sending.Go(func() {
			if _, err := io.CopyN(io.MultiWriter(c, sent), rand.Reader, size); err != nil {
				t.Errorf("send: %v", err)
			}
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil { //nolint:errcheck,forcetypeassert // every way has it
				t.Errorf("end: %v", err)
			}
		})
		n, err := io.Copy(got, c) // it ends because the guest's echo ends: half-closing went there and back
		sending.Wait()
		if err != nil || n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			t.Errorf("%d bytes came back, %v; want the %d that were sent", n, err, size)
		}
	})
}

// TestGuestEndsFirst reads to the guest's end, and then still sends.
func TestGuestEndsFirst(t *testing.T) {
	heard := make(chan string, len(ways()))
	everyWay(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "bye")
		_ = c.CloseWrite()
		text, _ := io.ReadAll(c)
		heard <- string(text)
	}, func(t *testing.T, c net.Conn) {
		t.Helper()
		if text, err := io.ReadAll(c); err != nil || string(text) != "bye" {
			t.Errorf("read %q, %v; want bye and the end", text, err)
		}
		_, err := io.WriteString(c, "still here")
		if err == nil {
			err = c.(interface{ CloseWrite() error }).CloseWrite() //nolint:errcheck,forcetypeassert // every way has it
		}
		if got := <-heard; err != nil || got != "still here" {
			t.Errorf("the guest heard %q, %v", got, err)
		}
	})
}

// TestGuestCut has the guest reset its connection: the other end must not take that for an end.
func TestGuestCut(t *testing.T) {
	everyWay(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	}, func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reading what was cut: %v; want ECONNRESET", err)
		}
	})
}

// TestClientGone closes the stream while the guest waits: the guest's connection ends.
func TestClientGone(t *testing.T) {
	over := make(chan error, len(ways()))
	everyWay(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "hello")
		_, err := c.Read(make([]byte, 1))
		over <- err
	}, func(t *testing.T, c net.Conn) {
		t.Helper()
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		if err := <-over; err == nil {
			t.Error("the guest read something; want an end")
		}
	})
}

// TestClientGoneAfterEnd closes a stream both of whose halves the client has done with, while the guest still sends.
func TestClientGoneAfterEnd(t *testing.T) {
	over := make(chan error, len(ways()))
	everyWay(t, func(c *net.TCPConn) {
		_, _ = io.Copy(io.Discard, c)
		for {
			if _, err := c.Write(make([]byte, 4096)); err != nil {
				over <- err
				return
			}
		}
	}, func(t *testing.T, c net.Conn) {
		t.Helper()
		if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil { //nolint:errcheck,forcetypeassert // every way has it
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		<-over
	})
}

func TestDeadlines(t *testing.T) {
	everyWay(t, echo, func(t *testing.T, c net.Conn) {
		t.Helper()
		_ = c.SetReadDeadline(time.Unix(1, 0))
		if _, err := c.Read(make([]byte, 1)); !isTimeout(err) {
			t.Errorf("a read past its deadline: %v", err)
		}
		_ = c.SetReadDeadline(time.Time{})
		if _, err := io.WriteString(c, "on"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "on" {
			t.Errorf("after a deadline: %q, %v", buf, err)
		}
	})
}

// TestErrorsKeepTheirKind has a node refuse streams for every reason.
func TestErrorsKeepTheirKind(t *testing.T) {
	reasons := []error{
		sandbox.NotFoundf("sandbox x is not on node a"), sandbox.Conflictf("paused"), sandbox.Invalidf("wrong"), sandbox.Exhaustedf("full"),
		sandbox.Deniedf("no"), sandbox.Unsupportedf("never"), errors.New("plain"),
		fmt.Errorf("dial port 80: %w: %w", sandbox.ErrUnavailable, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}),
	}
	kinds := []error{
		sandbox.ErrNotFound, sandbox.ErrConflict, sandbox.ErrInvalid, sandbox.ErrExhausted, sandbox.ErrUnavailable, sandbox.ErrDenied,
		sandbox.ErrUnsupported, syscall.ECONNREFUSED,
	}
	h := link.Handlers{Guest: func(_ context.Context, _ sandbox.Member, _ sandbox.ID, port uint16) (net.Conn, error) {
		return nil, reasons[port-1]
	}}
	for _, w := range ways() {
		t.Run(w.name, func(t *testing.T) {
			open := w.open(t, newRig(t), h)
			for i, want := range reasons {
				_, err := open(t.Context(), uint16(i+1))
				if err == nil || !bytes.Contains([]byte(err.Error()), []byte(want.Error())) {
					t.Errorf("%v; want its text to hold %q", err, want)
				}
				for _, kind := range kinds {
					if errors.Is(err, kind) != errors.Is(want, kind) {
						t.Errorf("%v is %v: %t; want %t", err, kind, errors.Is(err, kind), errors.Is(want, kind))
					}
				}
			}
		})
	}
}

// TestWhoMayOpen tries every kind of stream on a node as every role.
func TestWhoMayOpen(t *testing.T) {
	r := newRig(t)
	h := tcpGuest(t, echo)
	h.RPC, h.Artifact = rpcOf("node"), http.NotFoundHandler()
	r.link(nodeA, h)
	to := r.direct(nodeA, h)
	for _, m := range []sandbox.Member{nodeB, proxyP} {
		l, _ := r.link(m, link.Handlers{})
		for _, kind := range []link.Kind{link.RPC, link.Guest, link.Artifact} {
			head := link.Head{Kind: kind, Node: "nodeaa"}
			if kind == link.Guest {
				head = link.GuestHead("nodeaa", box, 80)
			}
			allowed := (m == proxyP && kind == link.Guest) || (m == nodeB && kind == link.Artifact)
			t.Logf("%s opens a %s stream", m, kind)
			relayed, err := l.Open(t.Context(), head)
			checkAllowed(t, relayed, err, allowed)
			straight, err := r.reach(m, l).Dial(t.Context(), to, head)
			checkAllowed(t, straight, err, allowed)
		}
		head := link.GuestHead("nodeaa", box, 80)
		head.From = server
		if _, err := l.Open(t.Context(), head); !errors.Is(err, sandbox.ErrDenied) {
			t.Errorf("%s opens a stream in the name of %s: %v; want ErrDenied", m, server, err)
		}
	}
}

func checkAllowed(t *testing.T, c net.Conn, err error, allowed bool) {
	t.Helper()
	if c != nil {
		_ = c.Close()
	}
	if (err == nil) != allowed || (!allowed && !errors.Is(err, sandbox.ErrDenied)) {
		t.Errorf("a stream: %v; allowed: %t", err, allowed)
	}
}

// TestOriginIsTold checks who the node believes to have opened a stream.
func TestOriginIsTold(t *testing.T) {
	for _, w := range ways() {
		t.Run(w.name, func(t *testing.T) {
			from := make(chan sandbox.Member, 1)
			open := w.open(t, newRig(t), link.Handlers{Guest: func(_ context.Context, m sandbox.Member, _ sandbox.ID, _ uint16) (net.Conn, error) {
				from <- m
				return nil, sandbox.NotFoundf("none")
			}})
			_, _ = open(t.Context(), 80)
			if got := <-from; got != proxyP && got.Role != sandbox.RoleServer {
				t.Errorf("opened by %v", got)
			}
		})
	}
}
