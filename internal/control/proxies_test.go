package control_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
)

// serving runs a control until the returned function is called.
func serving(t *testing.T, c *control.Control) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	synctest.Wait()
	return stop
}

// newestTable returns the first message of a control's routes, and leaves no connection behind.
func newestTable(t *testing.T, c *control.Control) *proxyv1.WatchResponse {
	t.Helper()
	_, h := proxyv1connect.NewRouteServiceHandler(c.RouteService(aProxy))
	srv := httptest.NewServer(h)
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := proxyv1connect.NewRouteServiceClient(srv.Client(), srv.URL).Watch(ctx, &proxyv1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = stream.Close() }()
	return receive(t, stream)
}

func onlyProxy(t *testing.T, c *control.Control) control.Proxy {
	t.Helper()
	all, err := c.ListProxies(t.Context())
	if err != nil || len(all) > 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	if len(all) == 0 {
		return control.Proxy{}
	}
	return all[0]
}

// TestProxies follows one proxy from its start to its end.
func TestProxies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := newPresences()
		cluster := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Presences = there })
		c := cluster.Control
		stop := serving(t, c)
		started, sequence := time.Now(), int64(0)
		tell := func(change func(*proxyv1.ReportRequest)) {
			t.Helper()
			sequence++
			req := &proxyv1.ReportRequest{Sequence: sequence, Full: sequence == 1, Proxy: &proxyv1.Proxy{
				Version: "v2", Address: "http://edge", StartedAt: timestamppb.New(started), Connections: 3, Requests: 2,
			}}
			change(req)
			if _, err := c.RouteService(aProxy).Report(t.Context(), req); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		state := func(when, want string) control.Proxy {
			t.Helper()
			p := onlyProxy(t, c)
			if p.State != want {
				t.Errorf("%s: %+v; want %q", when, p, want)
			}
			return p
		}
		state("before it comes", "")
		tell(func(*proxyv1.ReportRequest) {})
		state("without the routing table", control.ProxyStarting)
		table := newestTable(t, c)
		tell(func(r *proxyv1.ReportRequest) {
			r.Proxy.Table, r.Proxy.TableVersion = table.GetTable(), table.GetVersion()
		})
		want := control.Proxy{
			ID: "pppppp", Version: "v2", Address: "http://edge", State: control.ProxyReady, Since: started.UTC(), HeardAt: time.Now(),
			Connections: 3, Requests: 2,
		}
		if diff := cmp.Diff(want, onlyProxy(t, c)); diff != "" {
			t.Error(diff)
		}
		mustCreate(t, cluster, minute())
		if p := state("after a change", control.ProxyReady); p.Behind < 1 {
			t.Errorf("behind by %d; want some", p.Behind)
		}
		asleep(20 * time.Second)
		state("without reports", control.ProxySilent)
		tell(func(r *proxyv1.ReportRequest) { r.Full = true })
		stop() // the record stays for the next server
		cluster.Restart(t, func(cfg *control.Config) { cfg.Presences = there })
		c = cluster.Control
		stop = serving(t, c)
		state("after the server started again", control.ProxySilent)
		tell(func(r *proxyv1.ReportRequest) {
			r.Full, r.Leaving, r.Activities = true, true, []*proxyv1.Activity{used("i1", 1, time.Now())}
		})
		if open, _, _ := c.Activity("i1"); open != 1 {
			t.Errorf("%d requests open through a proxy that leaves; want 1", open)
		}
		if p := onlyProxy(t, c); p.ID != "" {
			t.Errorf("a proxy that left: %+v", p)
		}
		asleep(11 * time.Second)
		if open, _, complete := c.Activity("i1"); open != 0 || !complete {
			t.Errorf("after it ended: %d open, complete %t", open, complete)
		}
		stop()
	})
}
