package sim

import (
	"context"
	"net"
	"net/http/httptest"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
	"github.com/cloister-dev/cloister/internal/routes"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// idle is a proxy that nobody uses.
type idle struct{ told atomic.Int64 }

func (p *idle) Changed(sandbox.Route)                 { p.told.Add(1) }
func (*idle) NodeDown(sandbox.NodeID)                 {}
func (*idle) Activities(time.Time) []sandbox.Activity { return nil }
func (*idle) Open() (connections, requests int)       { return 0, 0 }

// counted counts what a server writes.
type counted struct {
	net.Listener
	written *atomic.Int64
}

func (l counted) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return countedConn{c, l.written}, nil
}

type countedConn struct {
	net.Conn
	written *atomic.Int64
}

func (c countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.written.Add(int64(n))
	return n, err
}

// joinProxies has proxies join at once, and returns when each has the whole table, with what the server sent for that.
func joinProxies(tb testing.TB, c *control.Control, proxies, boxes int) (bytes int64) {
	tb.Helper()
	_, h := proxyv1connect.NewRouteServiceHandler(c.RouteService(func(context.Context) (sandbox.Member, bool) {
		return sandbox.Member{Role: sandbox.RoleProxy, ID: "pppppp"}, true
	}))
	var written atomic.Int64
	srv := httptest.NewUnstartedServer(h)
	srv.Listener = counted{srv.Listener, &written}
	srv.Start()
	defer srv.Close()
	ctx, cancel := context.WithCancel(tb.Context())
	var running, synced sync.WaitGroup
	for range proxies {
		table, err := routes.New(routes.Config{
			Server: proxyv1connect.NewRouteServiceClient(srv.Client(), srv.URL), ReportEvery: time.Hour,
		})
		if err != nil {
			tb.Fatal(err)
		}
		p := &idle{}
		running.Go(func() { _ = table.Run(ctx, p) })
		synced.Go(func() {
			for (!table.Ready() || p.told.Load() < int64(boxes)) && ctx.Err() == nil {
				<-time.After(time.Millisecond)
			}
		})
	}
	synced.Wait()
	cancel()
	running.Wait()
	return written.Load()
}

// A hundred proxies that join at once get the table of ten thousand sandboxes once each: the server makes it once, and
// nothing grows with proxies times sandboxes but the bytes that are sent.
func BenchmarkProxiesJoin(b *testing.B) {
	const proxies, boxes = 100, 10_000
	c := apitest.NewCluster(b, nil)
	for range boxes {
		if _, err := c.Control.Create(b.Context(), control.CreateRequest{Timeout: time.Hour}); err != nil {
			b.Fatal(err)
		}
	}
	var bytes int64
	for b.Loop() {
		bytes += joinProxies(b, c.Control, proxies, boxes)
	}
	b.ReportMetric(float64(bytes)/float64(b.N)/proxies, "bytes/proxy")
}

// A change of a sandbox costs the same with a hundred followers as with none.
func BenchmarkRouteChange(b *testing.B) {
	for _, followers := range []int{0, 100} {
		b.Run(strconv.Itoa(followers), func(b *testing.B) {
			c := apitest.NewCluster(b, nil)
			box, err := c.Control.Create(b.Context(), control.CreateRequest{Timeout: time.Hour})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			var running sync.WaitGroup
			for range followers {
				running.Go(func() { _ = c.Control.RunProxy(ctx, &idle{}) })
			}
			for b.Loop() {
				if _, err := c.Control.SetTimeout(b.Context(), box.ID, time.Hour); err != nil {
					b.Fatal(err)
				}
			}
			cancel()
			running.Wait()
		})
	}
}

func TestProxiesJoin(t *testing.T) {
	const proxies, boxes = 20, 2500
	c := apitest.NewCluster(t, nil)
	for range boxes {
		if _, err := c.Control.Create(t.Context(), control.CreateRequest{Timeout: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	if sent := joinProxies(t, c.Control, proxies, boxes); sent > proxies*boxes*100 {
		t.Errorf("%d bytes for each route of a proxy, want fewer than 100", sent/proxies/boxes)
	}
}
