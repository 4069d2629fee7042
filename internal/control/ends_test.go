package control_test

import (
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// usedProxy is a proxy in the server's process.
type usedProxy struct {
	mu   sync.Mutex
	uses map[sandbox.ID]sandbox.Activity
}

func (*usedProxy) Changed(sandbox.Route)   {}
func (*usedProxy) NodeDown(sandbox.NodeID) {}
func (*usedProxy) Open() (int, int)        { return 0, 0 }

func (p *usedProxy) Activities(time.Time) []sandbox.Activity {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.uses))
}

func (p *usedProxy) use(id sandbox.ID, open int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.uses[id] = sandbox.Activity{ID: id, Open: open, Last: time.Now()}
}

// proxied runs f in a bubble, with a cluster whose server has a proxy.
func proxied(t *testing.T, f func(t *testing.T, c *apitest.Cluster, p *usedProxy)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c, p := apitest.NewCluster(t, nil), &usedProxy{uses: make(map[sandbox.ID]sandbox.Activity)}
		c.Control.LeadEnds(true)
		var wait sync.WaitGroup
		wait.Go(func() { _ = c.Control.RunProxy(t.Context(), p) })
		t.Cleanup(wait.Wait)
		f(t, c, p)
	})
}

func decided(b *sandbox.Sandbox) control.Decision {
	return control.Decision{ID: b.ID, Generation: b.Generation, Reason: "idle for 1m0s"}
}

// lastChange returns the type of a node's newest change.
func lastChange(n *apitest.Node) string {
	all := n.Changes(0)
	return all[len(all)-1].GetType()
}

// TestDecides checks that nodes leave ends to a server only while that leads.
func TestDecides(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	n := apitest.NewNode("bbbbbb")
	resp, err := c.Control.Register(t.Context(), &nodev1.RegisterRequest{NodeId: string(n.ID)})
	if err != nil {
		t.Fatal(err)
	}
	for _, leading := range []bool{false, true, false} {
		c.Control.LeadEnds(leading)
		got, err := c.Control.Report(t.Context(), &nodev1.ReportRequest{NodeId: string(n.ID), Epoch: resp.GetEpoch(), Full: true})
		if err != nil || got.GetDecides().AsDuration() > 0 != leading {
			t.Errorf("leading %t: %v, %v", leading, got.GetDecides(), err)
		}
	}
}

// TestPauseDue has a sandbox paused at its end: not while somebody uses it, and not by a decision about what it was before.
func TestPauseDue(t *testing.T) {
	proxied(t, func(t *testing.T, c *apitest.Cluster, p *usedProxy) {
		t.Helper()
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute, AutoPause: true, AutoResume: true, IdleTimeout: true})
		settled(time.Hour)
		p.use(box.ID, 1)
		if err := c.Control.PauseDue(t.Context(), decided(&box)); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("while a request is open: %v", err)
		}
		if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StateRunning || got.Reason != "" {
			t.Errorf("after that: %s: %s", got.State, got.Reason)
		}
		p.use(box.ID, 0)
		settled(59 * time.Second)
		if err := c.Control.PauseDue(t.Context(), decided(&box)); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("used less than its timeout ago: %v", err)
		}
		settled(2 * time.Second)
		stale := decided(&box)
		stale.Generation--
		if err := c.Control.PauseDue(t.Context(), stale); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("a stale decision: %v", err)
		}
		if err := c.Control.PauseDue(t.Context(), decided(&box)); err != nil {
			t.Fatal(err)
		}
		if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StatePaused || got.Reason == "" || lastChange(c.Node) != "paused" {
			t.Errorf("at its end: %s: %s, %s", got.State, got.Reason, lastChange(c.Node))
		}
		if _, err := c.Control.Wake(t.Context(), box.ID); err != nil {
			t.Fatal(err)
		}
		if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StateRunning || got.Reason != "" || time.Until(got.EndAt) != time.Minute {
			t.Errorf("woken: %s: %s, ends in %s", got.State, got.Reason, time.Until(got.EndAt))
		}
	})
}

// TestEndDue has a sandbox ended at its end, and checks who else's commands the decision gives way to.
func TestEndDue(t *testing.T) {
	proxied(t, func(t *testing.T, c *apitest.Cluster, p *usedProxy) {
		t.Helper()
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute})
		p.use(box.ID, 1)
		late := decided(&box)
		late.Forced = true
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Hour); err != nil {
			t.Fatal(err)
		}
		if err := c.Control.EndDue(t.Context(), late); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("its timeout was set meanwhile: %v", err)
		}
		late.Generation++
		if err := c.Control.EndDue(t.Context(), late); err != nil || lastChange(c.Node) != "timed_out" {
			t.Errorf("at its end: %v, %s", err, lastChange(c.Node))
		}
		if err := c.Control.EndDue(t.Context(), late); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("once more: %v", err)
		}
	})
}

// TestSilentProxy checks that nothing is paused of which a proxy could know more.
func TestSilentProxy(t *testing.T) {
	proxied(t, func(t *testing.T, c *apitest.Cluster, _ *usedProxy) {
		t.Helper()
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute, AutoPause: true})
		report(t, c.Control, 1, true)
		if err := c.Control.PauseDue(t.Context(), decided(&box)); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("while a proxy that reported is silent: %v", err)
		}
	})
}

// TestIdleTemplate checks that a template can have the timeouts of its sandboxes count from their last use.
func TestIdleTemplate(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	for _, on := range []bool{true, false} {
		if _, err := c.Control.ChangeTemplate(t.Context(), "base", control.TemplateChange{IdleTimeout: &on}); err != nil {
			t.Fatal(err)
		}
		if box := mustCreate(t, c, minute()); box.IdleTimeout != on {
			t.Errorf("template %t: idle timeout is %t", on, box.IdleTimeout)
		}
	}
}

// settled sleeps until everything that was due by then has been done too: what the test looks at is asked for on round times.
func settled(d time.Duration) {
	asleep(d)
	synctest.Wait()
}

// TestSlidingEnd checks that the end of a sandbox moves with its use, whoever tells of that.
func TestSlidingEnd(t *testing.T) {
	proxied(t, func(t *testing.T, c *apitest.Cluster, p *usedProxy) {
		t.Helper()
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute, IdleTimeout: true})
		fixed := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute})
		ends := func(when string, id sandbox.ID, want time.Duration) {
			t.Helper()
			got, err := c.Control.Get(t.Context(), id)
			page, listErr := c.Control.List(t.Context(), control.ListQuery{})
			i := slices.IndexFunc(page.Sandboxes, func(b sandbox.Sandbox) bool { return b.ID == id })
			if err != nil || listErr != nil || time.Until(got.EndAt) != want || time.Until(page.Sandboxes[i].EndAt) != want {
				t.Errorf("%s: it ends in %s, want %s (%v, %v)", when, time.Until(got.EndAt), want, err, listErr)
			}
		}
		ends("at first", box.ID, time.Minute)
		settled(50 * time.Second)
		p.use(box.ID, 1)
		p.use(fixed.ID, 1)
		settled(2 * time.Second)
		ends("in use", box.ID, time.Minute)
		ends("in use, with a fixed end", fixed.ID, 8*time.Second)
		p.use(box.ID, 0)
		settled(10 * time.Second)
		ends("ten seconds after its use", box.ID, 50*time.Second)
		c.Node.SetBusy(box.ID)
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		ends("at work", box.ID, time.Minute)
		c.Node.SetBusy()
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		settled(time.Second)
		ends("a second after its work", box.ID, 59*time.Second)
	})
}
