package hosts_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestClusterDrain empties nodes whose sandboxes are in use.
func TestClusterDrain(t *testing.T) {
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Hidden: 1, Proxies: 1, Programs: []string{workloadDir}})
	one, two, proxy := c.Nodes[0], c.Nodes[1], c.Proxies[0]
	s := sandboxOn(t, c, one)
	work(t, c, proxy, s.ID)

	t.Run("restart", func(t *testing.T) {
		all, open := busy(t, c, s.ID), streamFrom(t, proxy, s.ID)
		one.Signal(os.Interrupt)
		select { // a stream runs through the node's process: it breaks, at once and not by silence
		case <-open.done:
		case <-time.After(10 * time.Second):
			t.Error("a stream to a sandbox whose node's process has ended hangs")
		}
		one.Again()
		c.Wait("the node to be back", func(ctx context.Context) bool { return nodeState(ctx, c, one) == "ready" })
		if got := sentriesIn(t, c, s.ID); len(got) == 0 {
			t.Error("the sandbox ended with the node's process")
		}
		checkWork(t, c, proxy, s.ID)
		for _, f := range all {
			f.stop()
		}
	})
	t.Run("there and back, upgraded", func(t *testing.T) {
		all := busy(t, c, s.ID)
		for _, from := range []*harness.Machine{one, two} {
			to := map[*harness.Machine]*harness.Machine{one: two, two: one}[from]
			if out, code := c.Server.CLI(t.Context(), "node", "drain", from.Name, "--timeout", "1m"); code != 0 || !strings.Contains(out, "drained") {
				t.Fatalf("drain %s: exit code %d, %s", from.Name, code, out)
			}
			if got := sentriesIn(t, c, s.ID); !slices.Equal(slices.Compact(got), []string{to.Name}) {
				t.Errorf("after the drain of %s the sandbox runs on %v; want %s alone", from.Name, got, to.Name)
			}
			checkWork(t, c, proxy, s.ID)
			from.Signal(os.Interrupt)
			from.Upgrade()
			c.Wait("the upgraded node to be back", func(ctx context.Context) bool { return nodeState(ctx, c, from) == "drained" })
			uncordon(t, c, from)
		}
		for _, f := range all {
			f.check(t)
		}
	})
	t.Run("paused", func(t *testing.T) {
		if _, err := c.Client().PauseSandbox(t.Context(), s.ID, ""); err != nil {
			t.Fatal(err)
		}
		snap := sandboxOn(t, c, one)
		made, err := c.Client().CreateSnapshot(t.Context(), snap.ID, client.CreateSnapshot{Name: "kept"})
		if err != nil {
			t.Fatal(err)
		}
		drain(t, c, one)
		got, err := c.Client().GetSandbox(t.Context(), s.ID)
		if err != nil || got.State != "paused" || c.Machine(got.NodeID) != two {
			t.Errorf("after the drain the paused sandbox is %s on %s, %v", got.State, got.NodeID, err)
		}
		if _, err := c.Client().ResumeSandbox(t.Context(), s.ID, client.ResumeSandbox{}); err != nil {
			t.Fatal(err)
		}
		checkWork(t, c, proxy, s.ID)
		from, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{Template: made.ID, TimeoutSeconds: 900})
		if err != nil || c.Machine(from.NodeID) != two {
			t.Errorf("from a snapshot of the drained node: on %s, %v", from.NodeID, err)
		}
		for _, id := range []string{from.ID, snap.ID} {
			if err := c.Client().KillSandbox(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
		uncordon(t, c, one)
	})
	t.Run("what cannot move", func(t *testing.T) { cannotMove(t, c, one) })
}

// cannotMove drains a node of a sandbox that may be on no other.
func cannotMove(t *testing.T, c *harness.Cluster, m *harness.Machine) {
	t.Helper()
	stays, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{
		TimeoutSeconds: 900, Metadata: map[string]string{"cloister.dev/node-selector": "cloister.dev/node=" + mustNode(t, c, m).ID},
	})
	if err != nil {
		t.Fatal(err)
	}
	out, code := c.Server.CLI(t.Context(), "node", "drain", m.Name, "--timeout", "1s")
	if code == 0 || !strings.Contains(out, stays.ID) || !strings.Contains(out, "no other node can take") {
		t.Errorf("drain of what cannot move: exit code %d, %s; want it named, and why", code, out)
	}
	if got := state(t.Context(), c.Server, stays.ID); got != "running" {
		t.Errorf("what could not be moved is %q", got)
	}
	if out, code := c.Server.CLI(t.Context(), "node", "drain", m.Name, "--force", "--max-parallel", "2"); code != 0 || !strings.Contains(out, "1 ended") {
		t.Errorf("drain by force: exit code %d, %s", code, out)
	}
	if got := state(t.Context(), c.Server, stays.ID); got == "running" {
		t.Error("what could not be moved runs after a drain by force")
	}
	uncordon(t, c, m)
}

// busy sends requests of every kind to a sandbox through each proxy.
func busy(t *testing.T, c *harness.Cluster, id string) []*traffic {
	t.Helper()
	return []*traffic{
		trafficTo(t, c.Proxies[0], id, false, false), trafficTo(t, c.Server, id, false, true), trafficTo(t, c.Proxies[0], id, true, false),
	}
}

func drain(t *testing.T, c *harness.Cluster, m *harness.Machine) {
	t.Helper()
	if out, code := c.Server.CLI(t.Context(), "node", "drain", m.Name, "--timeout", "1m"); code != 0 {
		t.Fatalf("drain %s: exit code %d, %s", m.Name, code, out)
	}
}

func uncordon(t *testing.T, c *harness.Cluster, m *harness.Machine) {
	t.Helper()
	if out, code := c.Server.CLI(t.Context(), "node", "uncordon", m.Name); code != 0 {
		t.Fatalf("uncordon %s: %s", m.Name, out)
	}
	if got := nodeState(t.Context(), c, m); got != "ready" {
		t.Errorf("uncordoned, node %s is %s", m.Name, got)
	}
}

// nodeState returns a node's state as the server tells it; "" where it does not.
func nodeState(ctx context.Context, c *harness.Cluster, m *harness.Machine) string {
	n, err := c.Node(ctx, m)
	if err != nil {
		return ""
	}
	return n.State
}

func mustNode(t *testing.T, c *harness.Cluster, m *harness.Machine) client.Node {
	t.Helper()
	n, err := c.Node(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
