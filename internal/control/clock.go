package control

import (
	"context"
	"log/slog"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// apart is by how much two machines' clocks must differ for it to count: what is less has no harm in it.
const apart = 2 * time.Second

// clocks is how the wall clocks of nodes differ from this server's. The ends of sandboxes come by their nodes' clocks and are
// kept by the server's, so that they can be compared with its own time. Its mutex comes after all others.
type clocks struct {
	mu    sync.Mutex
	nodes map[sandbox.NodeID]*skew
}

// skew is by how much a clock is ahead. One report alone may have been on its way for long, so it takes two that agree to change
// what is known.
type skew struct{ ahead, last time.Duration }

func newClocks() *clocks { return &clocks{nodes: make(map[sandbox.NodeID]*skew)} }

// note takes what a node's clock showed when that of the server showed now, and returns by how much it is ahead now and by how
// much that is more than before. A node that does not say counts as agreeing.
func (k *clocks) note(node sandbox.NodeID, theirs, now time.Time) (ahead, by time.Duration) {
	if theirs.IsZero() {
		return 0, 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	d := theirs.Sub(now.Round(0)) // by the wall clock
	s := k.nodes[node]
	if s == nil {
		s = &skew{last: d}
		k.nodes[node] = s
	}
	if (d-s.ahead).Abs() >= apart && (d-s.last).Abs() < apart {
		by = d - s.ahead
		s.ahead = d
	}
	s.last = d
	return s.ahead, by
}

// here returns by this server's clock what is t by a node's; zero stays what it is.
func (k *clocks) here(node sandbox.NodeID, t time.Time) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s := k.nodes[node]; s != nil {
		return moved(t, -s.ahead)
	}
	return t
}

// behind is by how much a clock that shows theirs is behind the one that shows now; 0 where that does no harm or is not told.
func behind(theirs, now time.Time) time.Duration {
	if d := now.Round(0).Sub(theirs); !theirs.IsZero() && d.Abs() >= apart {
		return d
	}
	return 0
}

// moved returns t moved by d; zero stays what it is.
func moved(t time.Time, d time.Duration) time.Time {
	if t.IsZero() {
		return t
	}
	return t.Add(d)
}

// boxFromWire reads what a node says of a sandbox; its end is one by this server's clock.
func (c *Control) boxFromWire(node sandbox.NodeID, w *agentv1.Sandbox) (sandbox.Sandbox, error) {
	box, err := sandboxFromWire(node, w)
	box.EndAt = c.fleet.clocks.here(node, box.EndAt)
	return box, err
}

// followClock takes what a node's clock shows. Where it or that of this server was set, the ends of the node's sandboxes are
// others by this server's.
func (c *Control) followClock(ctx context.Context, node sandbox.NodeID, theirs, now time.Time) {
	ahead, by := c.fleet.clocks.note(node, theirs, now)
	if by == 0 {
		return
	}
	c.log.LogAttrs(ctx, slog.LevelWarn, "a node's clock and this server's differ otherwise than before: ends of sandboxes are counted by the node's",
		nodeAttr(node), slog.Duration("ahead", ahead))
	for _, id := range c.index.at(node, func(e *entry) bool { return !e.box.EndAt.IsZero() && !e.box.State.Ended() }) {
		c.index.change(id, now, func(e *entry) bool {
			if e.box.NodeID != node || e.box.EndAt.IsZero() {
				return false
			}
			e.box.EndAt = e.box.EndAt.Add(-by)
			return true
		})
	}
}
