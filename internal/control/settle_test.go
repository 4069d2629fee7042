package control_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// runUntil has a control run until the returned function is called.
func runUntil(t *testing.T, c *apitest.Cluster) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Control.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// unreplicated has silent nodes noticed as by default, and nothing copied.
func unreplicated(cfg *control.Config) { cfg.Limits = control.Limits{SnapshotReplicas: 1} }

// unheardOf is a pair of nodes of which the second received the sandbox of the first, which nobody was told of: its answers are
// lost, and then it does not answer at all. The sandbox has gone on where it was, unless halfway is set: then the server ended
// in the middle, and the sandbox waits there.
func unheardOf(t *testing.T, halfway bool) *pair {
	t.Helper()
	c := apitest.NewCluster(t, unreplicated)
	p := &pair{Cluster: c, a: c.Node, b: apitest.NewNode("bbbbbb")}
	p.box = mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
	c.Join(t, p.b)
	stop := runUntil(t, c)
	p.b.FailOn("Receive", apitest.Fault{Err: errAway, After: true})
	p.b.FailOn("Forget", apitest.Fault{Err: errAway})
	if halfway {
		p.a.FailOn("Return", apitest.Fault{Err: errAway})
	}
	p.drain(t, control.DrainRequest{})
	synctest.Wait()
	if halfway {
		asleep(time.Second)
	}
	stop()
	p.Agents.Set(p.b.ID, nil)
	if _, err := p.Control.UpdateNode(t.Context(), "aaaaaa", control.NodeChange{Cordoned: new(false)}); err != nil {
		t.Fatal(err)
	}
	p.a.FailOn("Return", apitest.Fault{})
	if has := p.b.Has(p.box.ID); has != agentv1.State_STATE_MIGRATING {
		t.Fatalf("it was received as %s", has)
	}
	want := agentv1.State_STATE_RUNNING
	if halfway {
		want = agentv1.State_STATE_MIGRATING
	}
	if has := p.a.Has(p.box.ID); has != want {
		t.Fatalf("where it was it is %s", has)
	}
	return p
}

// heal lets the second node answer again.
func (p *pair) heal(t *testing.T) {
	t.Helper()
	p.b.FailOn("Receive", apitest.Fault{})
	p.b.FailOn("Forget", apitest.Fault{})
	p.Agents.Set(p.b.ID, p.b)
	p.Join(t, p.b)
}

// restart replaces the server, which knows nothing but what is stored, and has it run.
func (p *pair) restart(t *testing.T) {
	t.Helper()
	p.Restart(t, unreplicated)
	running(t, p.Cluster)
}

// gone wants nothing of the sandbox to be anywhere, nor noted.
func (p *pair) gone(t *testing.T) {
	t.Helper()
	for _, n := range []*apitest.Node{p.a, p.b} {
		if has := n.Has(p.box.ID); has != agentv1.State_STATE_UNSPECIFIED && has != agentv1.State_STATE_DELETED {
			t.Errorf("node %s has it as %s", n.ID, has)
		}
	}
	if got, err := p.Control.Get(t.Context(), p.box.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("it is %s, %v", got.State, err)
	}
	if left, err := p.Decided.Placement(t.Context(), p.box.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("its placement is %+v, %v", left, err)
	}
	if left, err := p.Decided.KillIntents(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("to be killed: %+v, %v", left, err)
	}
}

// TestReceivedUnheard has a node receive a sandbox and not say so, and come back after the sandbox went on where it was and, in
// most cases, was killed there: what it received never counts, and goes, whoever is heard first.
func TestReceivedUnheard(t *testing.T) {
	steps := map[string]func(*testing.T, *pair) (ended bool){
		"goes on": func(t *testing.T, p *pair) bool {
			t.Helper()
			running(t, p.Cluster)
			p.passA(t, 3)
			p.heal(t)
			return false
		},
		"killed": func(t *testing.T, p *pair) bool {
			t.Helper()
			running(t, p.Cluster)
			mustKill(t, p)
			p.passA(t, 20)
			p.heal(t)
			return true
		},
		"killed, long forgotten": func(t *testing.T, p *pair) bool {
			t.Helper()
			running(t, p.Cluster)
			mustKill(t, p)
			p.passA(t, 20)
			asleep(3 * time.Hour)
			p.restart(t)
			p.Join(t, p.a)
			p.heal(t)
			return true
		},
		"killed, another server hears the receiver first": func(t *testing.T, p *pair) bool {
			t.Helper()
			mustKill(t, p)
			p.restart(t)
			p.heal(t)
			asleep(10 * time.Second)
			p.Join(t, p.a)
			return true
		},
		"killed while no server runs, and home first": func(t *testing.T, p *pair) bool {
			t.Helper()
			if _, err := p.a.Kill(t.Context(), &agentv1.KillRequest{Id: string(p.box.ID)}); err != nil {
				t.Fatal(err)
			}
			p.restart(t)
			p.Join(t, p.a)
			asleep(10 * time.Second)
			p.heal(t)
			return true
		},
		"lost where it was": func(t *testing.T, p *pair) bool {
			t.Helper()
			p.restart(t)
			p.a = apitest.NewNode(p.a.ID)
			p.Join(t, p.a)
			p.heal(t)
			return true
		},
	}
	for name, step := range steps {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := unheardOf(t, false)
				ended := step(t, p)
				p.pass(t, 20*time.Second)
				if p.b.Arrivals(p.box.ID) > 0 {
					t.Error("what was received ran")
				}
				if ended {
					p.gone(t)
					return
				}
				p.check(t, p.a, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
			})
		})
	}
}

// TestReceivedAndLost has the node that a sandbox was moved to lose it before it ran there: it goes on where it was.
func TestReceivedAndLost(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		t.Run(fmt.Sprintf("server restarts %t", restarts), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t)
				p.b.FailOn("Arrive", apitest.Fault{Err: errAway})
				p.drain(t, control.DrainRequest{})
				synctest.Wait()
				asleep(2 * time.Second)
				if _, err := p.b.Forget(t.Context(), &agentv1.ForgetRequest{Id: string(p.box.ID)}); err != nil {
					t.Fatal(err)
				}
				p.b.FailOn("Arrive", apitest.Fault{})
				if _, err := p.Control.UpdateNode(t.Context(), "aaaaaa", control.NodeChange{Cordoned: new(false)}); err != nil {
					t.Fatal(err)
				}
				if restarts {
					p.restart(t)
					p.Join(t, p.a)
					p.Join(t, p.b)
				}
				p.pass(t, 30*time.Second)
				p.check(t, p.a, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
			})
		})
	}
}

// passA lets seconds pass in which only the first node reports.
func (p *pair) passA(t *testing.T, seconds int) {
	t.Helper()
	for range seconds {
		if err := p.Report(t, p.a, false); err != nil {
			t.Fatal(err)
		}
		asleep(time.Second)
		synctest.Wait()
	}
}

func mustKill(t *testing.T, p *pair) {
	t.Helper()
	if err := p.Control.Kill(t.Context(), p.box.ID); err != nil {
		t.Fatal(err)
	}
}

// TestServerEndsInTheMiddle has the server end while a sandbox is saved at one node and received at another. It goes on at one
// of them; where only that is heard which received it, it waits.
func TestServerEndsInTheMiddle(t *testing.T) {
	for _, first := range []string{"home", "receiver", "both"} {
		t.Run(first, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := unheardOf(t, true)
				p.restart(t)
				switch first {
				case "home":
					p.Join(t, p.a)
					p.passA(t, 10)
					if has := p.a.Has(p.box.ID); has != agentv1.State_STATE_RUNNING {
						t.Errorf("where it was it is %s", has)
					}
					p.heal(t)
				case "receiver":
					p.heal(t)
					asleep(10 * time.Second)
					if has := p.b.Has(p.box.ID); has != agentv1.State_STATE_MIGRATING {
						t.Errorf("where it was received it is %s before anybody knows of the other", has)
					}
					p.heal(t)
					p.Join(t, p.a)
				default:
					p.Join(t, p.a)
					p.heal(t)
				}
				p.pass(t, 15*time.Second)
				at := p.b
				if first == "home" {
					at = p.a
				}
				p.check(t, at, sandbox.StateRunning, agentv1.State_STATE_RUNNING)
				mustKill(t, p)
				p.pass(t, 5*time.Second)
				p.gone(t)
			})
		})
	}
}

// TestReceivedBesideTheMove has a node receive a sandbox unheard of before another takes it, where it is killed.
func TestReceivedBesideTheMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, unreplicated)
		p := &pair{Cluster: c, a: c.Node, b: apitest.NewNode("bbbbbb"), box: mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})}
		third := apitest.NewNode("cccccc")
		c.Join(t, third)
		for range 5 { // so that it is the second choice
			mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
		}
		c.Join(t, p.b)
		running(t, c)
		p.b.FailOn("Receive", apitest.Fault{Err: errAway, After: true})
		p.b.FailOn("Forget", apitest.Fault{Err: errAway})
		p.drain(t, control.DrainRequest{})
		synctest.Wait()
		if a, b, c := p.a.Has(p.box.ID), p.b.Has(p.box.ID), third.Has(p.box.ID); a != agentv1.State_STATE_UNSPECIFIED ||
			b != agentv1.State_STATE_MIGRATING || c != agentv1.State_STATE_RUNNING {
			t.Fatalf("it is %s, %s, %s", a, b, c)
		}
		p.Agents.Set(p.b.ID, nil)
		mustKill(t, p)
		passWith(t, c, 20*time.Second, p.a, third)
		p.heal(t)
		passWith(t, c, 20*time.Second, p.a, p.b, third)
		p.gone(t)
	})
}

// TestKilledWhileItMoves kills a sandbox that was saved for a move, of which one end or both do not answer: it goes as soon as
// they do.
func TestKilledWhileItMoves(t *testing.T) {
	for _, back := range []string{"home first", "receiver first", "another server"} {
		t.Run(back, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := unheardOf(t, true)
				running(t, p.Cluster)
				p.Agents.Set(p.a.ID, nil)
				asleep(20 * time.Second)
				mustKill(t, p)
				if _, err := p.Control.Get(t.Context(), p.box.ID); !errors.Is(err, sandbox.ErrNotFound) {
					t.Errorf("after the kill: %v", err)
				}
				switch back {
				case "home first":
					p.Join(t, p.a)
					p.passA(t, 8)
					p.heal(t)
				case "another server":
					p.restart(t)
					fallthrough
				default:
					p.heal(t)
					asleep(8 * time.Second)
					p.heal(t)
					p.Join(t, p.a)
				}
				p.pass(t, 15*time.Second)
				p.gone(t)
			})
		})
	}
}

// TestKilledWhereItIsStuck kills a sandbox that waits for its other end: it is gone at once, and its copies when they can be.
func TestKilledWhereItIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		p.b.FailOn("Arrive", apitest.Fault{Err: errAway})
		p.drain(t, control.DrainRequest{})
		synctest.Wait()
		asleep(2 * time.Second)
		p.Agents.Set(p.b.ID, nil)
		mustKill(t, p)
		asleep(5 * time.Second)
		p.b.FailOn("Arrive", apitest.Fault{})
		p.Join(t, p.b)
		p.pass(t, 15*time.Second)
		p.gone(t)
	})
}
