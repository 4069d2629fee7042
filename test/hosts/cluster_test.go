package hosts_test

import (
	"context"
	"testing"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestClusterRuns makes sandboxes on two nodes that joined, one of them behind address translation, and runs something in each.
func TestClusterRuns(t *testing.T) {
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
