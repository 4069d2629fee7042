package control_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// passWith lets time pass in which the nodes report every second.
func passWith(t *testing.T, c *apitest.Cluster, d time.Duration, nodes ...*apitest.Node) {
	t.Helper()
	for ; d > 0; d -= time.Second {
		for _, n := range nodes {
			if err := c.Report(t, n, false); err != nil {
				t.Fatal(err)
			}
		}
		asleep(time.Second)
		synctest.Wait()
	}
}

// TestReturnsWithoutItsDisk has the home of a paused sandbox come back with nothing, before it counts as down: the sandbox is
// brought back from its replica, also by a server that has just started.
func TestReturnsWithoutItsDisk(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c, others, box := guarded(t)
			c.Node.Lose(box.ID)
			if restart {
				c.Restart(t, impatient)
				running(t, c)
				c.Join(t, others[0])
				c.Join(t, others[1])
			}
			c.Join(t, c.Node)
			if len(records(t, c)) != 1 {
				t.Fatal("its record is gone")
			}
			if !restart {
				if s := stateOf(t, c, box.ID); s != sandbox.StatePaused {
					t.Errorf("it is %s", s)
				}
				if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrUnavailable) {
					t.Errorf("resumed at a node that has lost it: %v", err)
				}
			}
			passWith(t, c, 5*time.Second, c.Node, others[0], others[1])
			got, err := c.Control.Get(t.Context(), box.ID)
			if err != nil || got.State != sandbox.StatePaused || got.NodeID == "aaaaaa" {
				t.Fatalf("%+v, %v", got, err)
			}
			if got, _, err = c.Control.Connect(t.Context(), box.ID, hour()); err != nil || got.State != sandbox.StateRunning {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}

// TestKillAfterItsNodeLostIt checks that a killed sandbox is not brought back.
func TestKillAfterItsNodeLostIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, others, box := guarded(t)
		c.Node.Lose(box.ID)
		c.Join(t, c.Node)
		if err := c.Control.Kill(t.Context(), box.ID); err != nil {
			t.Error(err)
		}
		passWith(t, c, 5*time.Second, c.Node, others[0], others[1])
		if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
			t.Error(err)
		}
	})
}

// TestHolderLosesItsDisk checks that another copy is made when a holder comes back with nothing.
func TestHolderLosesItsDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, others, box := guarded(t)
		holder, other := others[0], others[1]
		if len(holder.Replicas()) == 0 {
			holder, other = other, holder
		}
		fresh := apitest.NewNode(holder.ID)
		c.Join(t, fresh)
		passWith(t, c, 3*time.Second, c.Node, other, fresh)
		all := records(t, c)
		if len(all) != 1 || len(all[0].Holders) == 0 {
			t.Fatalf("%+v", all)
		}
		silent(t, c, c.Node, 40*time.Second, other, fresh)
		if got, err := c.Control.Get(t.Context(), box.ID); err != nil || got.NodeID == "aaaaaa" || got.State != sandbox.StatePaused {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

// TestForcedRemovalBringsBack checks that what has a replica outlives its node, also one that answers and is removed by force.
func TestForcedRemovalBringsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, box := guarded(t)
		if _, err := c.Control.UpdateNode(t.Context(), "aaaaaa", control.NodeChange{AddTaints: []sandbox.Taint{{Key: "a", Effect: sandbox.NoSchedule}}}); err != nil {
			t.Fatal(err)
		}
		if err := c.Control.RemoveNode(t.Context(), "aaaaaa", true); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Control.Get(t.Context(), box.ID); err != nil || got.NodeID == "aaaaaa" || got.State != sandbox.StatePaused {
			t.Errorf("%+v, %v", got, err)
		}
		if has := c.Node.Has(box.ID); has != agentv1.State_STATE_UNSPECIFIED {
			t.Errorf("the removed node has it as %s", has)
		}
		if left, err := c.Records.NodeSettings(t.Context()); err != nil || len(left) != 0 {
			t.Errorf("%v, %v", left, err)
		}
	})
}

// TestLeaveOfAStoppedNode has a node leave on which nothing runs any more, before it counts as down.
func TestLeaveOfAStoppedNode(t *testing.T) {
	c, n := newClub(t), newNewcomer(t, "bbbbbb", "second")
	if err := c.join(t, n, c.token(t, control.TokenRequest{})); err != nil {
		t.Fatal(err)
	}
	ctx := control.WithMember(t.Context(), n.identity.Member())
	node := apitest.NewNode("bbbbbb")
	c.Join(t, node)
	c.Agents.Set("aaaaaa", nil)
	mustCreate(t, c.Cluster, minute())
	if _, err := c.Control.UpdateNode(t.Context(), "bbbbbb", control.NodeChange{Reason: "gone", Cordoned: new(true)}); err != nil {
		t.Fatal(err)
	}
	c.Agents.Set("bbbbbb", nil)
	if _, err := c.Control.Leave(ctx, &clusterv1.LeaveRequest{}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("left with a sandbox: %v", err)
	}
	if _, err := c.Control.Leave(ctx, &clusterv1.LeaveRequest{Force: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.GetNode(t.Context(), "bbbbbb"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("its node is still there: %v", err)
	}
	if left, err := c.Records.NodeSettings(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("%v, %v", left, err)
	}
	if left, err := c.Records.Nodes(t.Context()); err != nil || slices.ContainsFunc(left, func(n sandbox.Node) bool { return n.ID == "bbbbbb" }) {
		t.Errorf("%v, %v", left, err)
	}
}

// bucketed is a cluster of two nodes with a bucket and no replicas, in which the first has a paused sandbox.
func bucketed(t *testing.T) (c *apitest.Cluster, other *apitest.Node, box sandbox.Sandbox) {
	t.Helper()
	c = apitest.NewCluster(t, withBucket)
	box = mustPause(t, c, mustCreate(t, c, minute()).ID)
	other = apitest.NewNode("bbbbbb")
	c.Join(t, other)
	running(t, c)
	passWith(t, c, 3*time.Second, c.Node, other)
	if got := c.Agents.Stored(); len(got) != 1 || got[0] != box.Checkpoint {
		t.Fatalf("in the bucket: %v", got)
	}
	return c, other, box
}

// TestBucketIsCleared checks that nothing stays in the bucket that no paused sandbox needs, also where a node fails to remove it
// at first.
func TestBucketIsCleared(t *testing.T) {
	ends := map[string]func(*testing.T, *apitest.Cluster, sandbox.ID) error{
		"killed": func(t *testing.T, c *apitest.Cluster, id sandbox.ID) error {
			t.Helper()
			return c.Control.Kill(t.Context(), id)
		},
		"resumed": func(t *testing.T, c *apitest.Cluster, id sandbox.ID) error {
			t.Helper()
			_, _, err := c.Control.Connect(t.Context(), id, hour())
			return err
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, other, box := bucketed(t)
				if err := end(t, c, box.ID); err != nil {
					t.Fatal(err)
				}
				c.Node.Fail(errAway)
				other.Fail(errAway)
				passWith(t, c, 3*time.Second, c.Node, other)
				if len(c.Agents.Stored()) != 1 {
					t.Error("removed although no node answered")
				}
				c.Node.Fail(nil)
				other.Fail(nil)
				passWith(t, c, 20*time.Second, c.Node, other)
				if got := c.Agents.Stored(); len(got) != 0 {
					t.Errorf("in the bucket: %v", got)
				}
			})
		})
	}
}

// withBucket has paused sandboxes written to a bucket, and to no node.
func withBucket(cfg *control.Config) { cfg.Limits = control.Limits{Bucket: true, SnapshotReplicas: 1} }

// TestBucketIsClearedByTheNextServer has the server end before anything is removed from the bucket, or while a node writes to it.
func TestBucketIsClearedByTheNextServer(t *testing.T) {
	for _, recorded := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c := apitest.NewCluster(t, withBucket)
			box := mustPause(t, c, mustCreate(t, c, minute()).ID)
			stop := runUntil(t, c)
			if !recorded {
				c.Node.FailOn("Guard", apitest.Fault{Err: errAway})
			}
			passWith(t, c, 3*time.Second, c.Node)
			if got := c.Agents.Stored(); len(got) != 1 || (len(records(t, c)) == 1) != recorded {
				t.Fatalf("in the bucket: %v, %+v", got, records(t, c))
			}
			c.Node.FailOn("Guard", apitest.Fault{})
			if recorded {
				stop()
			}
			if err := c.Control.Kill(t.Context(), box.ID); err != nil {
				t.Fatal(err)
			}
			if !recorded {
				stop()
			}
			c.Restart(t, withBucket)
			running(t, c)
			c.Join(t, c.Node)
			passWith(t, c, 11*time.Minute, c.Node) // an earlier server's commands may be carried out until then
			if got := c.Agents.Stored(); len(got) != 0 {
				t.Errorf("in the bucket: %v", got)
			}
			if left, err := c.Decided.Stored(t.Context()); err != nil || len(left) > 0 {
				t.Errorf("noted: %+v, %v", left, err)
			}
		})
	}
}

// TestRecoveredIsNotStoredTwice checks that what a sandbox was brought back from stays in the bucket for the next time.
func TestRecoveredIsNotStoredTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, other, box := bucketed(t)
		third := apitest.NewNode("cccccc")
		c.Join(t, third)
		silent(t, c, c.Node, 40*time.Second, other, third)
		for _, n := range []*apitest.Node{other, third} {
			for _, call := range n.Calls() {
				if call == "RemoveCheckpoint "+box.Checkpoint {
					t.Errorf("node %s removed it", n.ID)
				}
			}
		}
		all := records(t, c)
		if len(all) != 1 || !all[0].Bucket || all[0].Checkpoint != box.Checkpoint || all[0].Home == "aaaaaa" {
			t.Fatalf("%+v", all)
		}
		second := other
		if all[0].Home == third.ID {
			other, second = third, other
		}
		silent(t, c, other, 40*time.Second, second)
		if got, err := c.Control.Get(t.Context(), box.ID); err != nil || got.NodeID != second.ID || got.State != sandbox.StatePaused {
			t.Errorf("brought back again: %+v, %v", got, err)
		}
	})
}

// TestRecoveryFromTheBucket has the home of a paused sandbox go down, or lose its disk, that no other node has a replica of.
func TestRecoveryFromTheBucket(t *testing.T) {
	for _, down := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c, other, box := bucketed(t)
			if down {
				silent(t, c, c.Node, 40*time.Second, other)
			} else {
				c.Node.Lose(box.ID)
				c.Join(t, c.Node)
				passWith(t, c, 3*time.Second, c.Node, other)
			}
			got, err := c.Control.Get(t.Context(), box.ID)
			if err != nil || got.State != sandbox.StatePaused || got.Generation <= box.Generation || down && got.NodeID != "bbbbbb" {
				t.Fatalf("%+v, %v", got, err)
			}
			if got, _, err = c.Control.Connect(t.Context(), box.ID, hour()); err != nil || got.State != sandbox.StateRunning {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}
