package control_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestListedProxies checks that nothing is known to be idle while a proxy that the server dials is not heard, for however long.
func TestListedProxies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, func(cfg *control.Config) {
			cfg.Presences, cfg.Listed = newPresences(), []string{"edge-1:3005"}
		}).Control
		serving(t, c)
		expect := func(when, state string, wantOpen int, wantComplete bool) {
			t.Helper()
			open, _, complete := c.Activity("i1")
			if open != wantOpen || complete != wantComplete || (c.ProxiesMissing() == 0) != wantComplete {
				t.Errorf("%s: %d open, complete %t, %d missing; want %d, %t", when, open, complete, c.ProxiesMissing(), wantOpen, wantComplete)
			}
			if p := onlyProxy(t, c); p.State != state {
				t.Errorf("%s: %+v; want %q", when, p, state)
			}
		}
		asleep(time.Hour)
		expect("before it is reached", control.ProxyUnreachable, 0, false)
		c.ProxyReached("elsewhere:3005", "pppppp")
		expect("another address", control.ProxyUnreachable, 0, false)
		c.ProxyReached("edge-1:3005", "pppppp")
		expect("before its first report", control.ProxyUnreachable, 0, false)
		report(t, c, 1, true, used("i1", 1, time.Now()))
		synctest.Wait()
		expect("heard", control.ProxyStarting, 1, true)
		asleep(time.Hour)
		expect("long after it fell silent", control.ProxyUnreachable, 1, false)
		report(t, c, 2, true)
		synctest.Wait()
		expect("back", control.ProxyStarting, 0, true)
		leave(t, c)
		asleep(time.Hour)
		expect("after it left", "", 0, true)
		c.ProxyReached("edge-1:3005", "pppppp")
		expect("back again", control.ProxyUnreachable, 0, false)
		c.ProxyReached("edge-1:3005", "qqqqqq")
		report(t, c, 1, true)
		expect("another machine at its address", control.ProxyUnreachable, 0, false)
	})
}

// leave has the proxy pppppp leave.
func leave(t *testing.T, c *control.Control) {
	t.Helper()
	if _, err := c.RouteService(aProxy).Report(t.Context(), &proxyv1.ReportRequest{Sequence: 3, Full: true, Leaving: true}); err != nil {
		t.Fatal(err)
	}
}

// TestFenceIsQuick pauses an idle sandbox that a proxy elsewhere could know more of: it answers at once, and the pause waits for no
// report that was due anyway.
func TestFenceIsQuick(t *testing.T) {
	proxied(t, func(t *testing.T, c *apitest.Cluster, _ *usedProxy) {
		t.Helper()
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute, AutoPause: true, IdleTimeout: true})
		asleep(time.Hour)
		report(t, c.Control, 1, true)
		var answering sync.WaitGroup
		answering.Go(func() { answerPausing(t, c.Control, box) })
		began := time.Now()
		if err := c.Control.PauseDue(t.Context(), decided(&box)); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 20*time.Millisecond {
			t.Errorf("a pause took %s", took)
		}
		answering.Wait()
	})
}

// answerPausing reports as a proxy does that hears that a sandbox is to pause.
func answerPausing(t *testing.T, c *control.Control, box sandbox.Sandbox) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := c.Await(ctx, box.ID, box.Route()); err != nil {
		t.Error(err)
		return
	}
	asleep(time.Millisecond) // as long as it takes to get there
	table := newestTable(t, c)
	_, err := c.RouteService(aProxy).Report(ctx, &proxyv1.ReportRequest{
		Sequence: 2, Proxy: &proxyv1.Proxy{Table: table.GetTable(), TableVersion: table.GetVersion()},
	})
	if err != nil {
		t.Error(err)
	}
}
