package hosts_test

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// hasty are settings by which the loss of a node is noticed soon.
func hasty(more ...string) []string {
	return append([]string{"--node-heartbeat", "300ms", "--node-down-after", "2s"}, more...)
}

// TestClusterLoss loses machines, their networks and the server.
func TestClusterLoss(t *testing.T) {
	c := harness.NewCluster(t, harness.Shape{Nodes: 3, Proxies: 1, Programs: []string{workloadDir}, Flags: hasty()})
	proxy, victim := c.Proxies[0], c.Nodes[0]
	runs, paused, stays := sandboxOn(t, c, victim), sandboxOn(t, c, victim), sandboxOn(t, c, c.Nodes[1])
	for _, s := range []client.Sandbox{runs, paused, stays} {
		work(t, c, proxy, s.ID)
	}
	if _, err := c.Client().PauseSandbox(t.Context(), paused.ID, ""); err != nil {
		t.Fatal(err)
	}
	c.Wait("copies of the paused sandbox", func(context.Context) bool { return guarded(t, c, paused.ID) })

	t.Run("killed", func(t *testing.T) {
		open := openRequest(t, proxy, runs.ID)
		victim.Kill()
		c.Wait("the node to be down", func(ctx context.Context) bool { return nodeState(ctx, c, victim) == "down" })
		c.Wait("the loss", func(ctx context.Context) bool { return state(ctx, c.Server, runs.ID) == "lost" })
		got, err := c.Client().GetSandbox(t.Context(), runs.ID)
		if err != nil || !strings.Contains(got.Reason, victim.Name) || got.EndedAt.IsZero() {
			t.Errorf("the lost sandbox: %+v, %v; want when it was lost, and with which node", got, err)
		}
		if err := <-open; err == nil {
			t.Error("the open request ended as if the answer were whole")
		}
		c.Wait("the proxy to say that it is lost", func(ctx context.Context) bool {
			began := time.Now()
			_, err := ask(ctx, proxy, runs.ID, "/ok")
			t.Logf("answered within %s: %d", time.Since(began), statusOf(err))
			return statusOf(err) == http.StatusBadGateway
		})
	})
	t.Run("recovered", func(t *testing.T) {
		c.Wait("the paused sandbox on another node", func(ctx context.Context) bool {
			s, err := c.Client().GetSandbox(ctx, paused.ID)
			return err == nil && s.State == "paused" && s.NodeID != paused.NodeID
		})
		if _, err := c.Client().ResumeSandbox(t.Context(), paused.ID, client.ResumeSandbox{}); err != nil {
			t.Fatal(err)
		}
		checkWork(t, c, proxy, paused.ID)
	})
	t.Run("returned", func(t *testing.T) {
		victim.Again()
		c.Wait("the node to be back", func(ctx context.Context) bool { return nodeState(ctx, c, victim) == "ready" })
		dropped(t, c, victim, paused.ID)
		if got := slices.Compact(sentriesIn(t, c, paused.ID)); len(got) != 1 || got[0] == victim.Name {
			t.Errorf("the sandbox that was brought back runs on %v; want one, and not the old node", got)
		}
		checkWork(t, c, proxy, paused.ID)
		if got := state(t.Context(), c.Server, runs.ID); got != "lost" {
			t.Errorf("what ran on the machine that lost power is %q; want lost", got)
		}
	})
	t.Run("cut off", func(t *testing.T) { cutOff(t, c, c.Nodes[1], stays.ID) })
	t.Run("server killed", func(t *testing.T) {
		f := trafficTo(t, proxy, stays.ID, false, false)
		short, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 2})
		if err != nil {
			t.Fatal(err)
		}
		home := c.Machine(short.NodeID)
		c.Server.Kill()
		c.Wait("the end of a sandbox's time without a server", func(context.Context) bool { return state(t.Context(), home, short.ID) == "" })
		checkAlone(t, proxy, stays.ID)
		c.Server.Again()
		for _, id := range []string{stays.ID, paused.ID} {
			c.Wait("the server to know its sandboxes", func(ctx context.Context) bool { return state(ctx, c.Server, id) == "running" })
		}
		f.check(t)
	})
}

// cutOff takes a node out of the network: it goes on by itself, and nothing of it runs twice.
func cutOff(t *testing.T, c *harness.Cluster, m *harness.Machine, runs string) {
	t.Helper()
	proxy := c.Proxies[0]
	paused, killed := sandboxOn(t, c, m), sandboxOn(t, c, m)
	for _, s := range []client.Sandbox{paused, killed} {
		work(t, c, proxy, s.ID)
		if _, err := c.Client().PauseSandbox(t.Context(), s.ID, ""); err != nil {
			t.Fatal(err)
		}
		c.Wait("copies of the paused sandbox", func(context.Context) bool { return guarded(t, c, s.ID) })
	}
	c.Lab.Isolate(m)
	c.Wait("the node to be missed", func(ctx context.Context) bool { return nodeState(ctx, c, m) != "ready" })
	if _, err := m.Client().ResumeSandbox(t.Context(), paused.ID, client.ResumeSandbox{}); err == nil || !strings.Contains(err.Error(), "server") {
		t.Errorf("resume on the node that is cut off: %v; want a refusal that says why", err)
	}
	if out, code := m.CLI(t.Context(), "sandbox", "exec", runs, "echo here"); code != 0 || out != "here\n" {
		t.Errorf("exec on the node that is cut off: exit code %d, %q", code, out)
	}
	c.Wait("the sandbox to be lost", func(ctx context.Context) bool { return state(ctx, c.Server, runs) == "lost" })
	var home *harness.Machine
	for _, id := range []string{paused.ID, killed.ID} {
		c.Wait("the paused sandbox to be on another node than the cut one", func(ctx context.Context) bool {
			s, err := c.Client().GetSandbox(ctx, id)
			if err != nil || s.State != "paused" || s.NodeID == paused.NodeID {
				return false
			}
			home = c.Machine(s.NodeID)
			return true
		})
	}
	if err := m.Client().KillSandbox(t.Context(), killed.ID); err != nil {
		t.Errorf("kill on the node that is cut off: %v", err)
	}
	if _, err := c.Client().ResumeSandbox(t.Context(), paused.ID, client.ResumeSandbox{}); err != nil {
		t.Fatal(err)
	}
	c.Lab.Heal()
	c.Wait("the sandbox to be found", func(ctx context.Context) bool { return state(ctx, c.Server, runs) == "running" })
	dropped(t, c, m, paused.ID)
	c.Wait("what was killed on the cut node to end where it was brought back", func(ctx context.Context) bool {
		return state(ctx, c.Server, killed.ID) == "" && state(ctx, home, killed.ID) == ""
	})
	told, err := c.Client().Events(t.Context(), client.ListEvents{SandboxID: killed.ID, Type: "kill_wanted", Limit: 1})
	if err != nil || len(told) != 1 || !strings.Contains(told[0].Message, m.Name) {
		t.Errorf("told of the kill: %+v, %v; want that it was on %s", told, err, m.Name)
	}
	for _, id := range []string{runs, paused.ID} {
		c.Wait("traffic after the cut", func(ctx context.Context) bool { _, err := ask(ctx, proxy, id, "/ok"); return err == nil })
		checkWork(t, c, proxy, id)
		if got := slices.Compact(sentriesIn(t, c, id)); len(got) != 1 {
			t.Errorf("sandbox %s runs on %v", id, got)
		}
	}
}

// dropped waits until a node has nothing of a sandbox that was brought back elsewhere.
func dropped(t *testing.T, c *harness.Cluster, m *harness.Machine, id string) {
	t.Helper()
	var last string
	defer func() { t.Logf("on %s the stale copy is %q", m.Name, last) }()
	c.Wait("the stale copy to be gone", func(context.Context) bool {
		last = state(t.Context(), m, id)
		return last == "" || last == "deleted"
	})
}

// checkAlone has a proxy serve without a server.
func checkAlone(t *testing.T, proxy *harness.Machine, id string) {
	t.Helper()
	if _, err := ask(t.Context(), proxy, id, "/ok"); err != nil {
		t.Errorf("without a server: %v", err)
	}
}

// guarded reports whether another node has what a sandbox is paused in, and that is recorded.
func guarded(t *testing.T, c *harness.Cluster, id string) bool {
	t.Helper()
	all, err := c.Client().Events(t.Context(), client.ListEvents{SandboxID: id, Type: "replicated", Limit: 1})
	return err == nil && len(all) > 0
}

// openRequest begins a request whose answer never ends, and gives how it ended.
func openRequest(t *testing.T, proxy *harness.Machine, id string) <-chan error {
	t.Helper()
	h := proxy.HTTP()
	t.Cleanup(h.CloseIdleConnections)
	ended, begun := make(chan error, 1), make(chan struct{})
	go func() {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:3002/sandbox/"+id+"/"+workloadPort+"/open", nil)
		var resp *http.Response
		if err == nil {
			resp, err = h.Do(req)
		}
		close(begun)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		ended <- err
	}()
	<-begun
	return ended
}
