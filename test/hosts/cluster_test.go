package hosts_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestClusterRuns makes sandboxes on two nodes that joined, one of them behind address translation, and runs something in each.
func TestClusterRuns(t *testing.T) {
	t.Parallel()
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Hidden: 1})
	for i, m := range c.Nodes {
		other := c.Nodes[1-i]
		if out, code := c.Server.CLI(t.Context(), "node", "cordon", other.Name); code != 0 {
			t.Fatalf("cordon %s: %s", other.Name, out)
		}
		s, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Machine(s.NodeID); got != m {
			t.Errorf("sandbox on %s; want %s, the one that is not cordoned", got.Name, m.Name)
		}
		if out, code := c.Server.CLI(t.Context(), "sandbox", "exec", s.ID, "echo $((6*7))"); code != 0 || out != "42\n" {
			t.Errorf("sandbox %s on %s: exit code %d, output %q", s.ID, m.Name, code, out)
		}
		if out, code := c.Server.CLI(t.Context(), "node", "uncordon", other.Name); code != 0 {
			t.Fatalf("uncordon %s: %s", other.Name, out)
		}
	}
	seen(t, c, c.Nodes[0])
	hidden := c.Nodes[1]
	c.Lab.Isolate(hidden)
	c.Wait("the cut node to be missed", func(ctx context.Context) bool {
		n, err := c.Node(ctx, hidden)
		return err == nil && n.State != "ready"
	})
	c.Lab.Heal()
	c.Wait("the healed node to be back", func(ctx context.Context) bool {
		n, err := c.Node(ctx, hidden)
		return err == nil && n.State == "ready"
	})
}

// seen has the server show what changes at a node, with heartbeats as by default, and logs how long each took: its health, its
// address, and what it runs.
func seen(t *testing.T, c *harness.Cluster, m *harness.Machine) {
	t.Helper()
	s := sandboxOn(t, c, m)
	shown := func(what string, ok func(ctx context.Context) bool) {
		began := time.Now()
		c.Wait(what, ok)
		t.Logf("%s: shown after %s", what, time.Since(began).Round(time.Millisecond))
	}
	for _, pid := range sentries(t, m.DataDir(), s.ID) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	shown("a sandbox that died", func(ctx context.Context) bool {
		got := state(ctx, c.Server, s.ID)
		return got != "" && got != "running"
	})
	m.Signal(syscall.SIGKILL)
	shown("a node whose process was killed", func(ctx context.Context) bool { return nodeState(ctx, c, m) != "ready" })
	moved := net.JoinHostPort(m.Addr.String(), "3014")
	m.Again("--node-addr", ":3014")
	shown("a node that is back, at another address", func(ctx context.Context) bool {
		n, err := c.Node(ctx, m)
		return err == nil && n.State == "ready" && n.Address == moved
	})
}

// TestClusterWithoutServer loses the server's machine: a proxy goes on serving what runs, and the node works by itself. Once the
// server is back it also carries what the proxy cannot send to the node directly.
func TestClusterWithoutServer(t *testing.T) {
	t.Parallel()
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Proxies: 1})
	node, proxy := c.Nodes[0], c.Proxies[0]
	s, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	c.Wait("traffic through the proxy", func(ctx context.Context) bool { return healthy(ctx, proxy, s.ID) })
	c.Server.Kill()
	if !healthy(t.Context(), proxy, s.ID) {
		t.Error("without the server the proxy does not reach the sandbox")
	}
	if out, code := node.CLI(t.Context(), "sandbox", "exec", s.ID, "echo here"); code != 0 || out != "here\n" {
		t.Errorf("on the node itself: exit code %d, output %q", code, out)
	}
	c.Server.Again()
	c.Wait("the server to know the sandbox again", func(ctx context.Context) bool {
		got, err := c.Client().GetSandbox(ctx, s.ID)
		return err == nil && got.State == "running"
	})
	c.Lab.Partition(proxy, node)
	c.Wait("traffic through the server", func(ctx context.Context) bool { return healthy(ctx, proxy, s.ID) })
	c.Lab.Heal()
}

// healthy reports whether the agent in a sandbox answers through a machine's proxy.
func healthy(ctx context.Context, proxy *harness.Machine, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return askAgent(ctx, proxy, id) == nil
}

// askAgent asks the agent in a sandbox through a machine's proxy how it is, and returns an error where it does not say that it
// is well.
func askAgent(ctx context.Context, proxy *harness.Machine, id string) error {
	h := proxy.HTTP()
	defer h.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:3002/health", http.NoBody)
	if err != nil {
		return err
	}
	req.Header.Set("E2b-Sandbox-Id", id)
	req.Header.Set("E2b-Sandbox-Port", "49983")
	resp, err := h.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusNoContent {
		err = &answerError{resp.StatusCode, string(text)}
	}
	return err
}
