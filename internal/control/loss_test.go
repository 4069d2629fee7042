package control_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// lossy is a cluster whose nodes' silence counts.
func lossy(t *testing.T) *apitest.Cluster {
	t.Helper()
	c := apitest.NewCluster(t, impatient)
	running(t, c)
	return c
}

// silent cuts a node off for a while.
func silent(t *testing.T, c *apitest.Cluster, n *apitest.Node, d time.Duration, others ...*apitest.Node) {
	t.Helper()
	c.Agents.Set(n.ID, nil)
	for ; d > 0; d -= time.Second {
		for _, o := range others {
			if err := c.Report(t, o, false); err != nil {
				t.Fatal(err)
			}
		}
		asleep(time.Second)
		synctest.Wait()
	}
}

func stateOf(t *testing.T, c *apitest.Cluster, id sandbox.ID) sandbox.State {
	t.Helper()
	box, err := c.Control.Get(t.Context(), id)
	if err != nil {
		t.Errorf("%s: %v", id, err)
	}
	return box.State
}

func TestLostAndFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		box, paused := mustCreate(t, c, control.CreateRequest{Timeout: time.Hour}), mustCreate(t, c, minute())
		mustPause(t, c, paused.ID)
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		silent(t, c, c.Node, 17*time.Second)
		got, err := c.Control.Get(t.Context(), box.ID)
		if err != nil || got.State != sandbox.StateLost || got.Reason == "" || got.EndedAt.IsZero() {
			t.Errorf("%+v, %v", got, err)
		}
		if s := stateOf(t, c, paused.ID); s != sandbox.StatePaused {
			t.Errorf("the paused one is %s", s)
		}
		for _, id := range []sandbox.ID{box.ID, paused.ID} {
			if _, _, err := c.Control.Connect(t.Context(), id, hour()); !errors.Is(err, sandbox.ErrUnavailable) {
				t.Errorf("connect to one that cannot be reached: %v", err)
			}
		}
		asleep(3 * time.Hour) // it is not forgotten while its node may return
		if s := stateOf(t, c, box.ID); s != sandbox.StateLost {
			t.Errorf("later it is %s", s)
		}
		c.Agents.Set("aaaaaa", c.Node)
		if err := c.Report(t, c.Node, false); err != nil { // only what changed: nothing
			t.Fatal(err)
		}
		if got, err := c.Control.Get(t.Context(), box.ID); err != nil || got.State != sandbox.StateRunning || got.Reason != "" || !got.EndedAt.IsZero() {
			t.Errorf("found again: %+v, %v", got, err)
		}
		for _, kind := range []string{"lost", "found"} {
			if events, err := c.Control.Events(t.Context(), control.EventQuery{SandboxID: box.ID, Type: kind}); err != nil || len(events) != 1 {
				t.Errorf("%d events %s, %v", len(events), kind, err)
			}
		}
	})
}

// TestLostForGood has a node return without what it ran.
// deaf is a node that hears no pause and no resume.
type deaf struct{ *apitest.Node }

func unheard(ctx context.Context) error {
	<-ctx.Done()
	return connect.NewError(connect.CodeUnavailable, ctx.Err())
}

func (deaf) Pause(ctx context.Context, _ *agentv1.PauseRequest) (*agentv1.PauseResponse, error) {
	return nil, unheard(ctx)
}

func (deaf) Resume(ctx context.Context, _ *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	return nil, unheard(ctx)
}

// What its node never heard of is what it was, also where the node was given up before that was certain.
func TestLostOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		box, paused := mustCreate(t, c, control.CreateRequest{Timeout: time.Hour}), mustCreate(t, c, minute())
		mustPause(t, c, paused.ID)
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		c.Agents.Set(c.Node.ID, deaf{c.Node})
		asleep(4 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		var g sync.WaitGroup
		g.Go(func() { _, _ = c.Control.Pause(ctx, box.ID, "") })
		g.Go(func() { _, _ = c.Control.Resume(ctx, paused.ID, control.ConnectRequest{Timeout: time.Hour}) })
		synctest.Wait()
		silent(t, c, c.Node, 13*time.Second)
		if s := stateOf(t, c, box.ID); s != sandbox.StateLost {
			t.Errorf("of a silent node it is %s", s)
		}
		cancel()
		g.Wait()
		if s := stateOf(t, c, paused.ID); s != sandbox.StatePaused {
			t.Errorf("the paused one is %s", s)
		}
		c.Agents.Set(c.Node.ID, c.Node)
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		if a, b := stateOf(t, c, box.ID), stateOf(t, c, paused.ID); a != sandbox.StateRunning || b != sandbox.StatePaused {
			t.Errorf("found again: %s and %s", a, b)
		}
	})
}

// A node that is back and has not told yet what it has may have everything: nobody is told that a sandbox is gone.
func TestLostUntilItsNodeTells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
		silent(t, c, c.Node, 17*time.Second)
		c.Agents.Set(c.Node.ID, c.Node)
		if _, err := c.Control.Register(t.Context(), &nodev1.RegisterRequest{
			NodeId: string(c.Node.ID), Name: "node-" + string(c.Node.ID), Version: "test", Architecture: "amd64", Kernel: "6.1",
			Engines: []*nodev1.Engine{{Name: "gvisor", Version: c.Node.EngineVersion}}, Capacity: c.Node.Load().GetCapacity(),
		}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("before it told: %v", err)
		}
		c.Join(t, c.Node)
		if s := stateOf(t, c, box.ID); s != sandbox.StateRunning {
			t.Errorf("after it told it is %s", s)
		}
	})
}

func TestLostForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		box, kept := mustCreate(t, c, minute()), mustCreate(t, c, minute())
		silent(t, c, c.Node, 17*time.Second)
		c.Node.Lose(box.ID)
		c.Join(t, c.Node)
		if s := stateOf(t, c, box.ID); s != sandbox.StateLost {
			t.Errorf("it is %s", s)
		}
		if s := stateOf(t, c, kept.ID); s != sandbox.StateRunning {
			t.Errorf("the other one is %s", s)
		}
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Minute); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("a command: %v", err)
		}
	})
}

// TestKillLost checks that a sandbox that is killed while its node is away is gone at once, and killed when that returns,
// also by the next server.
func TestKillLost(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := lossy(t)
			box := mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
			silent(t, c, c.Node, 17*time.Second)
			if err := c.Control.Kill(t.Context(), box.ID); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("after the kill: %v", err)
			}
			if restart {
				c.Restart(t, impatient)
				running(t, c)
			}
			c.Join(t, c.Node)
			if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("its node is back: %v", err)
			}
			asleep(3 * time.Second)
			synctest.Wait()
			if has := c.Node.Has(box.ID); has != agentv1.State_STATE_UNSPECIFIED {
				t.Errorf("the node has it as %s", has)
			}
			if left, err := c.Decided.KillIntents(t.Context()); err != nil || len(left) != 0 {
				t.Errorf("%v, %v", left, err)
			}
		})
	}
}

// TestCutLink checks that a node whose link broke gets nothing new at once, and is ready with its next report.
func TestCutLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		c.Control.NodeUnreachable("aaaaaa")
		c.Control.NodeUnreachable("nobody")
		if n := nodeOf(t, c, "aaaaaa"); n.State != sandbox.NodeSuspect {
			t.Errorf("it is %s", n.State)
		}
		if _, err := c.Control.Create(t.Context(), minute()); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("it got a sandbox: %v", err)
		}
		asleep(2 * time.Second)
		if n := nodeOf(t, c, "aaaaaa"); n.State != sandbox.NodeSuspect {
			t.Errorf("later it is %s", n.State)
		}
		c.Control.NodeReachable("aaaaaa")
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		mustCreate(t, c, minute())
	})
}

// guarded is a cluster of three nodes in which the first has a paused sandbox that the others can bring back.
func guarded(t *testing.T) (c *apitest.Cluster, others [2]*apitest.Node, box sandbox.Sandbox) {
	t.Helper()
	c = apitest.NewCluster(t, impatient)
	box = mustCreate(t, c, minute())
	box = mustPause(t, c, box.ID)
	for i, id := range []sandbox.NodeID{"bbbbbb", "cccccc"} {
		others[i] = apitest.NewNode(id)
		c.Join(t, others[i])
	}
	running(t, c)
	asleep(3 * time.Second)
	synctest.Wait()
	return c, others, box
}

func records(t *testing.T, c *apitest.Cluster) []sandbox.Replica {
	t.Helper()
	all, err := c.Decided.Replicas(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestReplicaIsMadeAndFenced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, others, box := guarded(t)
		b, d := others[0], others[1]
		all := records(t, c)
		if len(all) != 1 || all[0].Home != "aaaaaa" || len(all[0].Holders) != 1 || all[0].Checkpoint != box.Checkpoint || !c.Node.Guarded(box.ID) {
			t.Fatalf("records %+v", all)
		}
		if got := slices.Concat(b.Replicas(), d.Replicas()); len(got) != 1 || got[0] != box.Checkpoint {
			t.Errorf("replicas %v", got)
		}
		if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); err != nil || len(records(t, c)) != 0 {
			t.Errorf("resumed: %v, %+v", err, records(t, c))
		}
		// What is of no use any more goes in the end.
		for range 70 {
			for _, n := range []*apitest.Node{c.Node, b, d} {
				if err := c.Report(t, n, false); err != nil {
					t.Fatal(err)
				}
			}
			asleep(time.Second)
		}
		if got := slices.Concat(b.Replicas(), d.Replicas()); len(got) != 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestFenceHolds checks that a sandbox is not resumed at home while nobody knows whether it is brought back elsewhere.
func TestFenceHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, box := guarded(t)
		c.Decided.FailWrites(sandbox.Unavailablef("the store does not answer"), false)
		if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrUnavailable) || c.Node.Resumes() != 0 {
			t.Errorf("%v, %d resumes", err, c.Node.Resumes())
		}
		c.Decided.FailWrites(nil, false)
		if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); err != nil {
			t.Error(err)
		}
	})
}

// TestRecovery has the home of a paused sandbox go down: a holder brings it back, and the old copy goes when the home returns.
func TestRecovery(t *testing.T) {
	for _, fault := range []string{"", "Receive", "Arrive"} {
		t.Run("fault "+fault, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, others, box := guarded(t)
				b, d := others[0], others[1]
				for _, n := range []*apitest.Node{b, d} {
					if fault != "" {
						n.FailOn(fault, apitest.Fault{Err: errAway, Times: 2, After: fault == "Arrive"})
					}
				}
				silent(t, c, c.Node, 60*time.Second, b, d)
				got, err := c.Control.Get(t.Context(), box.ID)
				if err != nil || got.State != sandbox.StatePaused || got.NodeID == "aaaaaa" || got.Generation <= box.Generation {
					t.Fatalf("%+v, %v", got, err)
				}
				if got, _, err = c.Control.Connect(t.Context(), box.ID, hour()); err != nil || got.State != sandbox.StateRunning {
					t.Fatalf("%+v, %v", got, err)
				}
				c.Join(t, c.Node) // with its old copy
				if at, _ := c.Control.Get(t.Context(), box.ID); at.NodeID != got.NodeID || at.State != sandbox.StateRunning {
					t.Errorf("the old copy counts: %+v", at)
				}
				asleep(3 * time.Second)
				synctest.Wait()
				if has := c.Node.Has(box.ID); has != agentv1.State_STATE_UNSPECIFIED {
					t.Errorf("the old copy is %s", has)
				}
			})
		})
	}
}

// TestKillGuarded checks that nothing brings a killed sandbox back.
func TestKillGuarded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, others, box := guarded(t)
		b, d := others[0], others[1]
		silent(t, c, c.Node, 10*time.Second, b, d)
		c.Agents.Set("aaaaaa", c.Node)
		if err := c.Control.Kill(t.Context(), box.ID); err != nil || len(records(t, c)) != 0 {
			t.Errorf("%v, %+v", err, records(t, c))
		}
		silent(t, c, c.Node, 40*time.Second, b, d)
		if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
			t.Error(err)
		}
	})
}

// TestRecoveryAfterARestart checks that a server that has just started waits before it gives nodes up, and then does.
func TestRecoveryAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, others, box := guarded(t)
		b, d := others[0], others[1]
		c.Agents.Set("aaaaaa", nil)
		c.Restart(t, impatient)
		c.Join(t, b)
		c.Join(t, d)
		running(t, c)
		silent(t, c, c.Node, 20*time.Second, b, d)
		if all := records(t, c); len(all) != 1 || all[0].Home != "aaaaaa" {
			t.Errorf("too soon: %+v", all)
		}
		silent(t, c, c.Node, 20*time.Second, b, d)
		if got, err := c.Control.Get(t.Context(), box.ID); err != nil || got.NodeID == "aaaaaa" {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func TestRemoveNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, others, box := guarded(t)
		b, d := others[0], others[1]
		lost := mustCreate(t, c, minute())
		for lost.NodeID != "aaaaaa" {
			lost = mustCreate(t, c, minute())
		}
		if err := c.Control.RemoveNode(t.Context(), "node-aaaaaa", false); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("a node with sandboxes: %v", err)
		}
		silent(t, c, c.Node, 16*time.Second, b, d)
		if err := c.Control.RemoveNode(t.Context(), "node-aaaaaa", false); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Control.Get(t.Context(), box.ID); err != nil || got.NodeID == "aaaaaa" || got.State != sandbox.StatePaused {
			t.Errorf("the paused one: %+v, %v", got, err)
		}
		if _, err := c.Control.Get(t.Context(), lost.ID); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("the lost one: %v", err)
		}
		if _, err := c.Control.GetNode(t.Context(), "aaaaaa"); !errors.Is(err, sandbox.ErrNotFound) {
			t.Error(err)
		}
		if left, err := c.Records.Nodes(t.Context()); err != nil || len(left) != 2 {
			t.Errorf("%d records, %v", len(left), err)
		}
	})
}

func TestRemoveNodeByForce(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	if err := c.Control.RemoveNode(t.Context(), "aaaaaa", true); err != nil {
		t.Fatal(err)
	}
	if c.Node.Has(box.ID) != agentv1.State_STATE_UNSPECIFIED {
		t.Error("its sandbox goes on")
	}
	if err := c.Control.RemoveNode(t.Context(), "aaaaaa", true); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

// TestSpread checks that templates come to nodes as the policy says, and popular ones to nodes that join.
func TestSpread(t *testing.T) {
	for _, want := range []int{0, 2, -1} {
		synctest.Test(t, func(t *testing.T) {
			c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.TemplatePlacement = want })
			if want == 0 {
				mustCreate(t, c, minute()) // which makes it popular
			}
			nodes := []*apitest.Node{apitest.NewNode("bbbbbb"), apitest.NewNode("cccccc")}
			for _, n := range nodes {
				n.SetImages()
				c.Join(t, n)
			}
			running(t, c)
			asleep(5 * time.Second)
			synctest.Wait()
			got, warm := 0, 0
			for _, n := range nodes {
				got += len(n.Calls())
				warm += len(n.Warmed())
			}
			wanted := map[int][2]int{0: {2, 2}, 2: {1, 0}, -1: {2, 0}}[want]
			if got != wanted[0] || warm != wanted[1] {
				t.Errorf("placement %d: %d fetches, %d warm", want, got, warm)
			}
		})
	}
}

// TestCreateFetches checks that a node that lacks the image is told who has it.
func TestCreateFetches(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	second := apitest.NewNode("bbbbbb")
	second.SetImages()
	c.Join(t, second)
	c.Node.Room = 1
	mustCreate(t, c, minute())
	for range 3 {
		if box := mustCreate(t, c, minute()); box.NodeID != "bbbbbb" {
			t.Fatalf("created at %s", box.NodeID)
		}
	}
	made := second.Created()
	if p := made[0].GetPeers(); len(p) != 1 || p[0].GetNodeId() != "aaaaaa" || len(made[2].GetPeers()) != 0 {
		t.Errorf("peers %v, then %v", p, made[2].GetPeers())
	}
}

func TestIdempotencyKey(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	second := apitest.NewNode("bbbbbb")
	c.Join(t, second)
	req := minute()
	req.IdempotencyKey = "order-1"
	box := mustCreate(t, c, req)
	for i := range 6 {
		if i == 3 {
			c.Restart(t, nil)
			c.Join(t, second)
			c.Join(t, c.Node)
		}
		if again := mustCreate(t, c, req); again.ID != box.ID {
			t.Errorf("repeat %d made %s, not %s", i, again.ID, box.ID)
		}
	}
	other := req
	other.Timeout = time.Hour
	if _, err := c.Control.Create(t.Context(), other); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("another request: %v", err)
	}
	// Its node may have made it: nobody else is asked while that is away.
	c.Agents.Set(box.NodeID, nil)
	if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("its node is away: %v", err)
	}
	// A clear refusal sends the next request elsewhere, and a failure frees the key.
	fresh := minute()
	fresh.IdempotencyKey = "order-2"
	c.Agents.Set(c.Node.ID, c.Node)
	c.Agents.Set(second.ID, second)
	c.Node.Room, second.Room = 1, 1
	for range 3 {
		_, _ = c.Control.Create(t.Context(), minute())
	}
	if _, err := c.Control.Create(t.Context(), fresh); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("both are full: %v", err)
	}
	second.Room = 100
	if box := mustCreate(t, c, fresh); box.NodeID != "bbbbbb" {
		t.Errorf("made at %s", box.NodeID)
	}
}

// TestTemplateSelector checks that what a template says of its nodes counts, unless the create says otherwise.
func TestTemplateSelector(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	c.Join(t, apitest.NewNode("bbbbbb"))
	if _, err := c.Records.UpdateTemplate(t.Context(), apitest.BaseID, func(tpl *sandbox.Template) error {
		tpl.NodeSelector = "cloister.dev/node=bbbbbb"
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if box := mustCreate(t, c, minute()); box.NodeID != "bbbbbb" {
			t.Errorf("created at %s", box.NodeID)
		}
	}
	req := minute()
	req.Metadata = map[string]string{control.KeyNodeSelector: "cloister.dev/node=aaaaaa"}
	if box := mustCreate(t, c, req); box.NodeID != "aaaaaa" {
		t.Errorf("created at %s", box.NodeID)
	}
}
