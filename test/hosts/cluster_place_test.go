package hosts_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestClusterPlaces looks at what nodes say of themselves, where sandboxes go, how templates get there, and what is asked twice.
func TestClusterPlaces(t *testing.T) {
	c := harness.NewCluster(t, harness.Shape{Nodes: 2, Flags: hasty("--pool-max", "0", "--pool-min", "0")})
	t.Run("nodes", func(t *testing.T) {
		for _, m := range c.Nodes {
			n := mustNode(t, c, m)
			if n.Capacity.MilliCPU <= 0 || n.Capacity.MemoryBytes <= 0 || n.Capacity.DiskBytes <= 0 || n.Architecture == "" || n.Kernel == "" ||
				len(n.CPUFeatures) == 0 || len(n.Engines) == 0 || n.Version == "" || n.StateAt.IsZero() || n.Address == "" {
				t.Errorf("node %s says of itself: %+v", m.Name, n)
			}
		}
	})
	t.Run("cut", func(t *testing.T) {
		m := c.Nodes[1]
		for _, want := range []string{"suspect", "down"} {
			c.Lab.Isolate(m)
			c.Wait("the node to be "+want, func(ctx context.Context) bool { return nodeState(ctx, c, m) == want })
		}
		c.Lab.Heal()
		c.Wait("the node to be back", func(ctx context.Context) bool { return nodeState(ctx, c, m) == "ready" })
		events, err := c.Client().Events(t.Context(), client.ListEvents{Type: "node_down", Limit: 5})
		if err != nil || len(events) != 1 {
			t.Errorf("%d events of a node that was down, %v", len(events), err)
		}
	})
	t.Run("asked twice", func(t *testing.T) { askedTwice(t, c) })
	t.Run("burst", func(t *testing.T) { burst(t, c) })
	t.Run("placement", func(t *testing.T) { placed(t, c) })
}

// fetchedBy counts the images that came to machines from others.
func fetchedBy(machines ...*harness.Machine) int {
	n := 0
	for _, m := range machines {
		n += len(m.LogLines(`"msg":"image fetched"`, 100))
	}
	return n
}

// placed has templates come to nodes before anybody asks for them there: because a policy says so, or because a node joins.
func placed(t *testing.T, c *harness.Cluster) {
	t.Helper()
	if out, code := c.Server.CLI(t.Context(), "sandbox", "kill", "--all"); code != 0 {
		t.Fatalf("kill --all: %s", out)
	}
	joiner := c.Join(c.Lab.Machine("joiner"), "node")
	began, s := time.Now(), client.Sandbox{}
	c.Wait("a sandbox on the node that joined", func(ctx context.Context) bool {
		var err error
		began = time.Now()
		s, err = c.Client().CreateSandbox(ctx, client.CreateSandbox{TimeoutSeconds: 900})
		return err == nil && c.Machine(s.NodeID) == joiner
	})
	lines := joiner.LogLines(`"msg":"image fetched"`, 1)
	var fetched struct{ Time time.Time }
	if len(lines) != 1 || json.Unmarshal([]byte(lines[0]), &fetched) != nil || fetched.Time.After(began) {
		t.Errorf("the node that joined was given a sandbox at %s, its template came then: %q; want it before", began, lines)
	}

	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM base\nRUN echo built > /tmp/built\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := fetchedBy(append(c.Nodes, joiner)...)
	if out, code := c.Server.CLI(t.Context(), "template", "build", dir, "--name", "app", "--from-template", "base"); code != 0 {
		t.Fatalf("build: exit code %d, %s", code, out)
	}
	for _, step := range []struct {
		policy string
		copies int
	}{{"2", 1}, {"all", 2}} {
		if out, code := c.Server.CLI(t.Context(), "template", "placement", "app", step.policy); code != 0 {
			t.Fatalf("placement: exit code %d, %s", code, out)
		}
		c.Wait("copies for "+step.policy, func(context.Context) bool { return fetchedBy(append(c.Nodes, joiner)...) >= before+step.copies })
		if got := fetchedBy(append(c.Nodes, joiner)...) - before; got != step.copies {
			t.Errorf("placement %s: %d copies were made; want %d", step.policy, got, step.copies)
		}
	}
}

// createWith creates a sandbox with an idempotency key.
func createWith(t *testing.T, c *harness.Cluster, key string, body client.CreateSandbox) (client.Sandbox, int) {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	h := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(c.Server.DataDir(), "cloister.sock"))
	}}}
	defer h.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://cloister/v1/sandboxes", bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	resp, err := h.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var s client.Sandbox
	_ = json.NewDecoder(resp.Body).Decode(&s) // the status tells
	return s, resp.StatusCode
}

// askedTwice creates with a key again and again, also after the server was restarted.
func askedTwice(t *testing.T, c *harness.Cluster) {
	t.Helper()
	body := client.CreateSandbox{TimeoutSeconds: 900}
	first, code := createWith(t, c, "key-1", body)
	if first.ID == "" {
		t.Fatalf("create: status %d", code)
	}
	if again, code := createWith(t, c, "key-1", body); again.ID != first.ID {
		t.Errorf("asked again: %s, status %d; want %s", again.ID, code, first.ID)
	}
	c.Server.Kill()
	c.Server.Again()
	c.Wait("the nodes", func(ctx context.Context) bool {
		return nodeState(ctx, c, c.Nodes[0]) == "ready" && nodeState(ctx, c, c.Nodes[1]) == "ready"
	})
	if again, code := createWith(t, c, "key-1", body); again.ID != first.ID {
		t.Errorf("asked again after a restart of the server: %s, status %d; want %s", again.ID, code, first.ID)
	}
	if other, _ := createWith(t, c, "key-2", body); other.ID == first.ID {
		t.Error("another key gave the same sandbox")
	}
}

// burst asks for more than the nodes have, from two sides at once.
func burst(t *testing.T, c *harness.Cluster) {
	t.Helper()
	room := int64(0)
	for _, m := range c.Nodes {
		n := mustNode(t, c, m)
		room += n.Capacity.MemoryBytes - n.Allocated.MemoryBytes
	}
	const asked = 16
	size := client.Resources{MemoryBytes: room / 8 >> 20 << 20, MilliCPU: 100}
	var made sync.Map
	var all sync.WaitGroup
	for range asked {
		all.Go(func() {
			if s, code := createWith(t, c, "", client.CreateSandbox{TimeoutSeconds: 900, Resources: size}); code == http.StatusCreated {
				made.Store(s.ID, nil)
			}
		})
	}
	all.Wait()
	count := 0
	made.Range(func(any, any) bool { count++; return true })
	for _, m := range c.Nodes {
		n := mustNode(t, c, m)
		if n.Allocated.MemoryBytes > n.Capacity.MemoryBytes || n.Allocated.MilliCPU > n.Capacity.MilliCPU {
			t.Errorf("node %s gave away %+v of %+v", m.Name, n.Allocated, n.Capacity)
		}
	}
	if count < 5 || count > 8 {
		t.Errorf("%d of %d sandboxes of an eighth of the room each were made; want 5 to 8", count, asked)
	}
	fetched := 0
	for _, m := range c.Nodes {
		fetched += strings.Count(m.Log(), `"msg":"image fetched"`)
	}
	if fetched != 1 {
		t.Errorf("the template was fetched %d times; want once, by the node that did not build it", fetched)
	}
}
