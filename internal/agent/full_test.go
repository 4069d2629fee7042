package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestMostSandboxes has a node refuse at once what goes beyond its number of sandboxes, and give warm ones back for others.
func TestMostSandboxes(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.opt.MaxSandboxes = 3
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 2
		n := m.boot()
		n.create()
		n.eventually("the pool is filled", func() bool { ready, filling := n.warmCount(); return ready == 2 && filling == 0 })
		n.create()
		n.create()
		began := time.Now()
		if _, err := n.Create(t.Context(), request()); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("one too many: %v", err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("refused after %v", took)
		}
	})
}
