package control_test

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

var (
	errAway   = connect.NewError(connect.CodeUnavailable, errors.New("connection refused"))
	errBroken = connect.NewError(connect.CodeInternal, errors.New("disk on fire"))
)

// pair is a cluster of two nodes whose control runs; the first node has one sandbox.
type pair struct {
	*apitest.Cluster
	a, b *apitest.Node
	box  sandbox.Sandbox
}

func newPair(t *testing.T) *pair {
	t.Helper()
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.SnapshotReplicas = 1 })
	p := &pair{Cluster: c, a: c.Node, b: apitest.NewNode("bbbbbb")}
	p.box = mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
	c.Join(t, p.b)
	running(t, c)
	return p
}

// tell has both nodes report.
func (p *pair) tell(t *testing.T) {
	t.Helper()
	for _, n := range []*apitest.Node{p.a, p.b} {
		if err := p.Report(t, n, false); err != nil {
			t.Fatal(err)
		}
	}
}

// pass lets time pass in which the nodes report every second.
func (p *pair) pass(t *testing.T, d time.Duration) {
	t.Helper()
	for ; d > 0; d -= time.Second {
		p.tell(t)
		asleep(time.Second)
		synctest.Wait()
	}
	p.tell(t)
}

func (p *pair) drain(t *testing.T, req control.DrainRequest) {
	t.Helper()
	if _, err := p.Control.DrainNode(t.Context(), "aaaaaa", req); err != nil {
		t.Fatal(err)
	}
}

// check wants the sandbox to be in a state at one node, and nothing of it at the other.
func (p *pair) check(t *testing.T, at *apitest.Node, state sandbox.State, wire agentv1.State) {
	t.Helper()
	got, err := p.Control.Get(t.Context(), p.box.ID)
	if err != nil || got.NodeID != at.ID || got.State != state {
		t.Errorf("the index has it at %s, %s, %v", got.NodeID, got.State, err)
	}
	for _, n := range []*apitest.Node{p.a, p.b} {
		want := agentv1.State_STATE_UNSPECIFIED
		if n == at {
			want = wire
		}
		if has := n.Has(p.box.ID); has != want {
			t.Errorf("node %s has it as %s, want %s", n.ID, has, want)
		}
	}
}

func nodeOf(t *testing.T, c *apitest.Cluster, id string) control.Node {
	t.Helper()
	n, err := c.Control.GetNode(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		paused := mustCreate(t, p.Cluster, minute())
		for paused.NodeID != "aaaaaa" {
			paused = mustCreate(t, p.Cluster, minute())
		}
		mustPause(t, p.Cluster, paused.ID)
		p.drain(t, control.DrainRequest{Reason: "new disk"})
		if n := nodeOf(t, p.Cluster, "aaaaaa"); n.State != sandbox.NodeDraining || !n.Settings.Cordoned {
			t.Errorf("it is %s", n.State)
		}
		p.pass(t, 6*time.Second)
		n := nodeOf(t, p.Cluster, "aaaaaa")
		if n.State != sandbox.NodeDrained || n.Drain == nil || n.Drain.Left != 0 || n.Drain.Moved < 2 || len(n.Drain.Failed) != 0 {
			t.Errorf("%s, %+v", n.State, n.Drain)
		}
		p.check(t, p.b, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
		if got, err := p.Control.Get(t.Context(), paused.ID); err != nil || got.State != sandbox.StatePaused || got.NodeID != "bbbbbb" {
			t.Errorf("%+v, %v", got, err)
		}
		if box := mustCreate(t, p.Cluster, minute()); box.NodeID != "bbbbbb" {
			t.Errorf("a drained node got %s", box.ID)
		}
		// What was moved is found by a server that has just started, before any report.
		p.Restart(t, nil)
		if got, err := p.Control.Get(t.Context(), p.box.ID); err != nil || got.NodeID != "bbbbbb" {
			t.Errorf("after a restart: %+v, %v", got, err)
		}
		// Its record goes with it.
		p.Join(t, p.a)
		p.Join(t, p.b)
		running(t, p.Cluster)
		if err := p.Control.Kill(t.Context(), p.box.ID); err != nil {
			t.Fatal(err)
		}
		p.pass(t, 3*time.Second)
		if _, err := p.Decided.Placement(t.Context(), p.box.ID); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("its placement: %v", err)
		}
	})
}

// TestMoveFaults has each command of a move fail, before and after it was carried out: the sandbox ends up running at one
// node, and only there.
func TestMoveFaults(t *testing.T) {
	tests := []struct {
		node    string
		command string
		fault   apitest.Fault
	}{
		{"b", "Fetch", apitest.Fault{Err: errBroken, Times: 1}},
		{"a", "Depart", apitest.Fault{Err: errBroken, Times: 1}},
		{"a", "Depart", apitest.Fault{Err: errAway, Times: 1}},
		{"a", "Depart", apitest.Fault{Err: errAway, Times: 1, After: true}},
		{"b", "Receive", apitest.Fault{Err: errBroken, Times: 1}},
		{"b", "Receive", apitest.Fault{Err: errAway, Times: 1, After: true}},
		{"b", "Arrive", apitest.Fault{Err: errAway, Times: 1}},
		{"b", "Arrive", apitest.Fault{Err: errAway, Times: 1, After: true}},
		{"b", "Arrive", apitest.Fault{Err: errAway, Times: 8}},
		{"b", "Arrive", apitest.Fault{Err: errBroken, Times: 1}},
		{"a", "Forget", apitest.Fault{Err: errAway, Times: 1}},
		{"a", "Forget", apitest.Fault{Err: errAway, Times: 1, After: true}},
	}
	for _, tt := range tests {
		name := tt.node + " " + tt.command + " " + tt.fault.Err.Error()
		if tt.fault.After {
			name += " after"
		}
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				node := p.a
				if tt.node == "b" {
					node = p.b
				}
				node.FailOn(tt.command, tt.fault)
				p.drain(t, control.DrainRequest{})
				p.pass(t, 40*time.Second)
				p.check(t, p.b, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
				if n := nodeOf(t, p.Cluster, "aaaaaa"); n.State != sandbox.NodeDrained {
					t.Errorf("%s, %+v", n.State, n.Drain)
				}
			})
		})
	}
}

// TestMoveTakenBack has the last step before a move counts, and its taking back, fail for good: the sandbox waits at both
// nodes, and goes on where it was once that node answers.
func TestMoveTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.b.FailOn("Receive", apitest.Fault{Err: errBroken})
		p.a.FailOn("Return", apitest.Fault{Err: errAway, Times: 1})
		p.drain(t, control.DrainRequest{})
		p.pass(t, 2*time.Second)
		if has := p.a.Has(p.box.ID); has != agentv1.State_STATE_MIGRATING {
			t.Errorf("it is %s", has)
		}
		no := false
		if _, err := p.Control.UpdateNode(t.Context(), "aaaaaa", control.NodeChange{Cordoned: &no}); err != nil {
			t.Fatal(err)
		}
		p.pass(t, 10*time.Second)
		p.check(t, p.a, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
		if n := nodeOf(t, p.Cluster, "aaaaaa"); n.State != sandbox.NodeReady || n.Drain != nil {
			t.Errorf("called off: %s, %+v", n.State, n.Drain)
		}
	})
}

// TestCommitUnknown has the store carry out the commit of a move and not say so, or refuse it.
func TestCommitUnknown(t *testing.T) {
	for _, after := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t)
			p.Decided.FailWrites(sandbox.Unavailablef("the store does not answer"), after)
			p.drain(t, control.DrainRequest{})
			p.pass(t, 3*time.Second)
			p.Decided.FailWrites(nil, false)
			p.pass(t, 20*time.Second)
			p.check(t, p.b, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
		})
	}
}

// TestServerDiesDuringAMove stops the server before or after a move counts: the next one finishes it by what the nodes and
// the placement say.
func TestServerDiesDuringAMove(t *testing.T) {
	for _, step := range []string{"Receive", "Arrive"} {
		t.Run(step, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				p.b.FailOn(step, apitest.Fault{Err: errAway, After: step == "Receive"})
				p.a.FailOn("Return", apitest.Fault{Err: errAway})
				p.b.FailOn("Forget", apitest.Fault{Err: errAway})
				p.drain(t, control.DrainRequest{})
				synctest.Wait()
				asleep(2 * time.Second)
				p.Restart(t, func(cfg *control.Config) { cfg.Limits.SnapshotReplicas = 1 })
				p.a.FailOn("Return", apitest.Fault{})
				p.b.FailOn(step, apitest.Fault{})
				p.b.FailOn("Forget", apitest.Fault{})
				p.Join(t, p.a)
				p.Join(t, p.b)
				running(t, p.Cluster)
				p.pass(t, 15*time.Second)
				p.check(t, p.b, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
			})
		})
	}
}

// TestCommandsWaitForAMove checks that a command for a sandbox that is on its way is carried out where it arrives.
func TestCommandsWaitForAMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		release := p.a.Hold()
		p.drain(t, control.DrainRequest{})
		synctest.Wait()
		var g sync.WaitGroup
		g.Go(func() {
			if got, err := p.Control.SetTimeout(t.Context(), p.box.ID, 2*time.Hour); err != nil || got.NodeID != "bbbbbb" {
				t.Errorf("set timeout at %s: %v", got.NodeID, err)
			}
		})
		synctest.Wait()
		if got, _ := p.Control.Get(t.Context(), p.box.ID); got.State != sandbox.StateMigrating {
			t.Errorf("meanwhile it is %s", got.State)
		}
		release()
		g.Wait()
	})
}

func TestDrainRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	for _, req := range []control.DrainRequest{{MaxParallel: -1}, {MaxParallel: 1000}, {Timeout: -time.Second}, {Reason: strings.Repeat("x", 300)}} {
		if _, err := c.Control.DrainNode(t.Context(), "aaaaaa", req); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", req, err)
		}
	}
	if _, err := c.Control.DrainNode(t.Context(), "nobody", control.DrainRequest{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

// TestDrainWithNowhereToGo checks what is told of sandboxes that cannot move, and that force ends them.
func TestDrainWithNowhereToGo(t *testing.T) {
	for _, force := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t)
			p.b.FailOn("Receive", apitest.Fault{Err: connect.NewError(connect.CodeResourceExhausted, errors.New("full"))})
			p.drain(t, control.DrainRequest{Timeout: 5 * time.Second, Force: force})
			p.pass(t, 10*time.Second)
			n := nodeOf(t, p.Cluster, "aaaaaa")
			if force {
				if _, err := p.Control.Get(t.Context(), p.box.ID); !errors.Is(err, sandbox.ErrNotFound) || n.State != sandbox.NodeDrained || n.Drain.Ended != 1 {
					t.Errorf("%s, %+v, %v", n.State, n.Drain, err)
				}
				return
			}
			p.check(t, p.a, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
			if n.State != sandbox.NodeCordoned || n.Drain.Left != 1 || len(n.Drain.Failed) != 1 || !strings.Contains(n.Drain.Failed[0].Reason, "full") ||
				!strings.Contains(n.Drain.Error, "its time is up") {
				t.Errorf("%s, %+v", n.State, n.Drain)
			}
		})
	}
}

// TestStuckDrain checks that a drain that does not end by itself says why at once, and no longer once it can go on.
func TestStuckDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.b.Room = 1
		full := mustCreate(t, p.Cluster, minute())
		for full.NodeID != "bbbbbb" {
			full = mustCreate(t, p.Cluster, minute())
		}
		p.drain(t, control.DrainRequest{})
		p.pass(t, time.Second)
		if d := nodeOf(t, p.Cluster, "aaaaaa").Drain; !strings.Contains(d.Stuck, "has no room") || !strings.Contains(d.Stuck, "--force") {
			t.Errorf("no room: %+v", d)
		}
		if _, err := p.Control.UpdateNode(t.Context(), "bbbbbb", control.NodeChange{Cordoned: new(true)}); err != nil {
			t.Fatal(err)
		}
		p.pass(t, time.Second)
		if d := nodeOf(t, p.Cluster, "aaaaaa").Drain; !strings.Contains(d.Stuck, "no other node") {
			t.Errorf("no other node: %+v", d)
		}
		p.b.Room = 0
		if _, err := p.Control.UpdateNode(t.Context(), "bbbbbb", control.NodeChange{Cordoned: new(false)}); err != nil {
			t.Fatal(err)
		}
		p.pass(t, 30*time.Second)
		if d := nodeOf(t, p.Cluster, "aaaaaa").Drain; d.Stuck != "" || d.DoneAt.IsZero() {
			t.Errorf("room again: %+v", d)
		}
	})
}

// TestDrainSurvivesARestart checks that the next server goes on with it.
func TestDrainSurvivesARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		p := &pair{Cluster: c, a: c.Node, b: apitest.NewNode("bbbbbb"), box: mustCreate(t, c, minute())}
		p.drain(t, control.DrainRequest{}) // nobody carries it out: this control does not run
		c.Restart(t, func(cfg *control.Config) { cfg.Limits.SnapshotReplicas = 1 })
		c.Join(t, p.a)
		c.Join(t, p.b)
		running(t, c)
		p.pass(t, 6*time.Second)
		p.check(t, p.b, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
		if n := nodeOf(t, c, "aaaaaa"); n.State != sandbox.NodeDrained {
			t.Errorf("%s, %+v", n.State, n.Drain)
		}
	})
}

// TestDrainCopiesAway checks that a snapshot that only the node has is copied before the node is drained.
func TestDrainCopiesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		s := mustSnapshot(t, p.Cluster, p.box.ID, "kept")
		p.b.FailOn("Fetch", apitest.Fault{Err: errAway})
		p.drain(t, control.DrainRequest{})
		p.pass(t, 4*time.Second)
		if n := nodeOf(t, p.Cluster, "aaaaaa"); n.State != sandbox.NodeDraining || len(n.Drain.Waiting) != 1 {
			t.Errorf("%s, %+v", n.State, n.Drain)
		}
		p.b.FailOn("Fetch", apitest.Fault{})
		p.pass(t, 12*time.Second)
		if n := nodeOf(t, p.Cluster, "aaaaaa"); n.State != sandbox.NodeDrained {
			t.Errorf("%s, %+v", n.State, n.Drain)
		}
		if got := p.b.Checkpoints(); len(got) != 1 || got[0] != s.Build.ID {
			t.Errorf("the other node has %v", got)
		}
	})
}

// TestArrivesPaused has a sandbox, of which there is no other copy, fail to run where it went: it is paused there.
func TestArrivesPaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.b.FailOn("Arrive", apitest.Fault{Err: errAway})
		p.drain(t, control.DrainRequest{})
		p.pass(t, 3*time.Second)
		p.a.Lose(p.box.ID)
		p.b.FailOn("Arrive", apitest.Fault{Err: errBroken})
		p.pass(t, 15*time.Second)
		p.check(t, p.b, sandbox.StatePaused, agentv1.State_STATE_PAUSED)
	})
}

// TestForcedDrainOfTheOnlyNode checks that force also gives up what no other node can have.
func TestForcedDrainOfTheOnlyNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Log = slog.New(slog.DiscardHandler) })
		box := mustCreate(t, c, minute())
		running(t, c)
		p := &pair{Cluster: c, a: c.Node, b: c.Node, box: box}
		p.drain(t, control.DrainRequest{Force: true})
		p.pass(t, 6*time.Second)
		if n := nodeOf(t, c, "aaaaaa"); n.State != sandbox.NodeDrained || n.Drain.Ended != 1 {
			t.Errorf("%s, %+v", n.State, n.Drain)
		}
	})
}
