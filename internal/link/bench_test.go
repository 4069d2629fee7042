package link_test

import (
	"context"
	"io"
	"net"
	"testing"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/link"
)

// BenchmarkCall is one unary call: over a link, and within the process, where the client is the handler.
func BenchmarkCall(b *testing.B) {
	b.Run("link", func(b *testing.B) {
		r := newRig(b)
		r.link(nodeA, link.Handlers{RPC: rpcOf("node")})
		c := r.hub.NodeClient("nodeaa")
		for b.Loop() {
			if _, err := get(b.Context(), c, ""); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("link-parallel", func(b *testing.B) {
		r := newRig(b)
		r.link(nodeA, link.Handlers{RPC: rpcOf("node")})
		c := r.hub.NodeClient("nodeaa")
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := get(b.Context(), c, ""); err != nil {
					b.Error(err)
				}
			}
		})
	})
	b.Run("in-process", func(b *testing.B) {
		c := &caller{name: "node"}
		for b.Loop() {
			if _, err := c.Get(b.Context(), &agentv1.GetRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// benchWay is a way to a guest.
type benchWay struct {
	name string
	open func(b *testing.B, serve func(*net.TCPConn)) func(context.Context) (net.Conn, error)
}

func benchWays() []benchWay {
	head := link.GuestHead("nodeaa", box, 80)
	return []benchWay{
		{"tcp", func(b *testing.B, serve func(*net.TCPConn)) func(context.Context) (net.Conn, error) {
			b.Helper()
			h := tcpGuest(b, serve)
			return func(ctx context.Context) (net.Conn, error) { return h.Guest(ctx, server, box, 80) }
		}},
		{"direct", func(b *testing.B, serve func(*net.TCPConn)) func(context.Context) (net.Conn, error) {
			b.Helper()
			r := newRig(b)
			to, reach := r.direct(nodeA, tcpGuest(b, serve)), r.reach(proxyP, nil)
			return func(ctx context.Context) (net.Conn, error) { return reach.Dial(ctx, to, head) }
		}},
		{"link", func(b *testing.B, serve func(*net.TCPConn)) func(context.Context) (net.Conn, error) {
			b.Helper()
			r := newRig(b)
			r.link(nodeA, tcpGuest(b, serve))
			return func(ctx context.Context) (net.Conn, error) { return r.hub.Open(ctx, head) }
		}},
		{"relayed", func(b *testing.B, serve func(*net.TCPConn)) func(context.Context) (net.Conn, error) {
			b.Helper()
			r := newRig(b)
			r.link(nodeA, tcpGuest(b, serve))
			p, _ := r.link(proxyP, link.Handlers{})
			return func(ctx context.Context) (net.Conn, error) { return p.Open(ctx, head) }
		}},
	}
}

// BenchmarkGuest measures opening a stream, 64 bytes there and back on an open one, and a download.
func BenchmarkGuest(b *testing.B) {
	for _, w := range benchWays() {
		b.Run("open/"+w.name, func(b *testing.B) {
			open := w.open(b, echo)
			for b.Loop() {
				c, err := open(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				_ = c.Close()
			}
		})
		b.Run("echo/"+w.name, func(b *testing.B) {
			c := opened(b, w, echo)
			buf := make([]byte, 64)
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("download/"+w.name, func(b *testing.B) {
			c := opened(b, w, func(c *net.TCPConn) {
				for buf := make([]byte, 64<<10); ; {
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			})
			buf := make([]byte, 1<<20)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func opened(b *testing.B, w benchWay, serve func(*net.TCPConn)) net.Conn {
	b.Helper()
	c, err := w.open(b, serve)(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return c
}
