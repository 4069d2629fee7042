package cli

import (
	"context"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/api/apitest"
)

// runControl carries out what the API asks for in the background, until the test ends.
func runControl(t *testing.T, w *world) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.cluster.Control.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestNodeDrainAndRemove(t *testing.T) {
	w := newWorld(t)
	w.cluster.Join(t, apitest.NewNode("bbbbbb"))
	runControl(t, w)
	if r := w.do("node", "rm", "aaaaaa"); r.code == 0 || !strings.Contains(r.err, "node-aaaaaa has 1 sandboxes") {
		t.Errorf("%+v", r)
	}
	r := w.do("node", "drain", "aaaaaa", "--timeout", "1m", "--max-parallel", "2", "--reason", "disk")
	if r.code != 0 || !strings.Contains(r.out, "drained, since") || !strings.Contains(r.out, "1 moved, 0 left") || !strings.Contains(r.err, "node-aaaaaa: ") {
		t.Errorf("%+v", r)
	}
	if out := w.must("sandbox", "ls", "-o", "json"); !strings.Contains(out, `"node_id": "bbbbbb"`) {
		t.Error(out)
	}
	w.must("node", "rm", "aaaaaa")
	if out := w.must("node", "ls"); strings.Contains(out, "aaaaaa") {
		t.Error(out)
	}
}

// TestNodeDrainIsLeftAlone checks that a command that is interrupted leaves the drain going, and says how to end it.
func TestNodeDrainIsLeftAlone(t *testing.T) {
	w := newWorld(t) // its control does not run: nothing is ever moved
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r := w.doContext(ctx, "node", "drain", "aaaaaa"); r.code == 0 {
		t.Errorf("%+v", r)
	}
	w.must("node", "cordon", "aaaaaa")
	if r := w.do("node", "drain", "aaaaaa", "--max-parallel", "99"); r.code == 0 || !strings.Contains(r.err, "max_parallel 99: want 1 to 32") {
		t.Errorf("%+v", r)
	}
	w.must("node", "uncordon", "aaaaaa")
}
