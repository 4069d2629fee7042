package control_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestSilentNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, impatient)
		running(t, c)
		states := []struct {
			after time.Duration
			want  sandbox.NodeState
		}{{5 * time.Second, sandbox.NodeReady}, {3 * time.Second, sandbox.NodeSuspect}, {9 * time.Second, sandbox.NodeDown}}
		for _, s := range states {
			asleep(s.after)
			n, err := c.Control.GetNode(t.Context(), "node-aaaaaa")
			if err != nil || n.State != s.want {
				t.Errorf("after %v: %s, %v; want %s", s.after, n.State, err, s.want)
			}
		}
		if _, err := c.Control.Create(t.Context(), minute()); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("a node that is down got a sandbox: %v", err)
		}
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		mustCreate(t, c, minute())
	})
}

func TestRestartFindsSandboxes(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	kept, forgotten := mustCreate(t, c, minute()), mustCreate(t, c, minute())
	c.Restart(t, nil)
	if _, err := c.Control.Get(t.Context(), kept.ID); err != nil {
		t.Errorf("before the report, by asking the node: %v", err)
	}
	if _, err := c.Control.Get(t.Context(), forgotten.ID); err != nil {
		t.Error(err)
	}
	c.Node.Lose(forgotten.ID)
	c.Join(t, c.Node)
	if got, err := c.Control.Get(t.Context(), kept.ID); err != nil || got.State != sandbox.StateRunning {
		t.Errorf("%+v, %v", got, err)
	}
	got, err := c.Control.Get(t.Context(), forgotten.ID)
	if err != nil || got.State != sandbox.StateLost || got.Reason == "" {
		t.Errorf("%+v, %v", got, err)
	}
	events, err := c.Control.Events(t.Context(), control.EventQuery{SandboxID: forgotten.ID, Type: "lost"})
	if err != nil || len(events) != 1 {
		t.Errorf("%d events, %v", len(events), err)
	}
	// A sandbox that the node names again is alive again.
	if list, err := c.Control.List(t.Context(), control.ListQuery{States: []sandbox.State{sandbox.StateRunning}}); err != nil || len(list.Sandboxes) != 1 {
		t.Errorf("%d running, %v", len(list.Sandboxes), err)
	}
}

// TestNodeByItselfForgetsWhatItHasNotAnyMore has a node's own control not call lost what ended, or went elsewhere, untold.
func TestNodeByItselfForgetsWhatItHasNotAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, again := range []func(*apitest.Cluster){
			func(c *apitest.Cluster) { c.Join(t, c.Node) },
			func(c *apitest.Cluster) { // under the same registration
				asleep(20 * time.Second)
				if err := c.Report(t, c.Node, true); err != nil {
					t.Fatal(err)
				}
			},
		} {
			forgets(t, again)
		}
	})
}

func forgets(t *testing.T, again func(*apitest.Cluster)) {
	t.Helper()
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.OneNode = true })
	kept, gone := mustCreate(t, c, minute()), mustCreate(t, c, minute())
	c.Join(t, c.Node)
	c.Node.Lose(gone.ID)
	again(c)
	if got, err := c.Control.Get(t.Context(), kept.ID); err != nil || got.State != sandbox.StateRunning {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := c.Control.Get(t.Context(), gone.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("%+v, %v; want it not found", got, err)
	}
}

// TestOwnNodeGivesUpTheNew has a node drop a sandbox that it made a moment ago, and say so to its own control only by leaving it
// out.
func TestOwnNodeGivesUpTheNew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.OneNode = true })
		running(t, c)
		kept, gone := mustCreate(t, c, minute()), mustCreate(t, c, minute())
		c.Node.Lose(gone.ID)
		if err := c.Report(t, c.Node, true); err != nil {
			t.Fatal(err)
		}
		asleep(3 * time.Second)
		synctest.Wait()
		if s := stateOf(t, c, kept.ID); s != sandbox.StateRunning {
			t.Errorf("the other one is %s", s)
		}
		if got, err := c.Control.Get(t.Context(), gone.ID); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%+v, %v; want it not found", got, err)
		}
	})
}

func TestFullReportSparesTheNew(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	// A full report of the present registration that was written before the create.
	c.Node.Lose(box.ID)
	if err := c.Report(t, c.Node, true); err != nil {
		t.Fatal(err)
	}
	if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StateRunning {
		t.Errorf("it is %s", got.State)
	}
}

func TestReports(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	_, err := c.Control.Report(t.Context(), &nodev1.ReportRequest{NodeId: "aaaaaa", Epoch: 5})
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("another epoch: %v", err)
	}
	_, err = c.Control.Report(t.Context(), &nodev1.ReportRequest{NodeId: "zzzzzz", Epoch: 5})
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("unknown node: %v", err)
	}
	_, err = c.Control.Register(t.Context(), &nodev1.RegisterRequest{NodeId: "../x"})
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("bad id: %v", err)
	}
	mustCreate(t, c, minute())
	c.Records.FailHistory(errors.New("disk full"))
	if err := c.Report(t, c.Node, false); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("events that are not kept: %v", err)
	}
	c.Records.FailHistory(nil)
	for range 2 { // taking it twice does no harm
		if err := c.Report(t, c.Node, true); err != nil {
			t.Fatal(err)
		}
	}
	events, err := c.Control.Events(t.Context(), control.EventQuery{Type: "started"})
	if err != nil || len(events) != 1 {
		t.Errorf("%d events, %v", len(events), err)
	}
}
