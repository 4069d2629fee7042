package agent

import (
	"testing"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
)

// TestForksLeaveThePoolAlone makes copies under the source's template and name, as forks are: they say nothing about what the
// template is.
func TestForksLeaveThePoolAlone(t *testing.T) {
	bubble(t, func(m *machine) {
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 4
		n := m.boot()
		id := n.create()
		full := func() bool { ready, _ := n.warmCount(); return ready == 2 }
		n.eventually("the pool is filled", full)
		_, err := n.save(id, "fork-1", kindMemory)
		m.check(err)
		n.create(func(r *agentv1.CreateRequest) { r.CheckpointId = "fork-1" })
		pass(time.Minute)
		if !full() {
			ready, _ := n.warmCount()
			m.t.Errorf("%d warm sandboxes of the template after a fork; want 2", ready)
		}
		n.verify()
	})
}
