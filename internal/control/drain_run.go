package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// drainEvery is how often a node that is being emptied is looked at.
	drainEvery = time.Second
	// moveBackoff is how long a sandbox that could not be moved is left alone.
	moveBackoff = 10 * time.Second
	// drainSettle is how long a node must have had nothing before it counts as drained: creates that were sent to it before it
	// was cordoned are in no report yet.
	drainSettle = 2 * time.Second
)

// runDrains empties the nodes whose settings say so, those of before a restart included, until ctx ends.
func (c *Control) runDrains(ctx context.Context) {
	var nodes sync.WaitGroup
	defer nodes.Wait()
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	for {
		for id, s := range c.fleet.settingsOf() {
			if s.Drain.Active() && c.drains.begin(id, s.Drain.StartedAt) {
				nodes.Go(func() {
					defer c.drains.end(id)
					c.drain(ctx, id, *s.Drain)
				})
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-c.drains.wake:
		}
	}
}

// drain empties a node, round by round, until nothing is left, its time is up, or it is called off.
func (c *Control) drain(ctx context.Context, node sandbox.NodeID, d sandbox.NodeDrain) {
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	var empty time.Time
	for c.stillDraining(node, d.StartedAt) {
		now := time.Now()
		late := !d.Deadline.IsZero() && now.After(d.Deadline)
		left := c.drainRound(ctx, node, d, late)
		switch {
		case left > 0:
			empty = time.Time{}
		case empty.IsZero():
			empty = now
		case now.Sub(empty) >= drainSettle:
			c.endDrain(ctx, node, d.StartedAt, "")
			return
		}
		if late && left > 0 && !d.Force {
			c.endDrain(ctx, node, d.StartedAt, "its time is up: "+c.drains.progress(node, &d).summary())
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (c *Control) stillDraining(node sandbox.NodeID, started time.Time) bool {
	s := c.fleet.settingsOf()[node]
	return s.Drain.Active() && s.Drain.StartedAt.Equal(started)
}

// drainRound moves what can be moved, ends what may be ended, copies what only this node has, and returns how much is left.
func (c *Control) drainRound(ctx context.Context, node sandbox.NodeID, d sandbox.NodeDrain, late bool) int {
	here := c.index.at(node, func(e *entry) bool { return !e.box.State.Ended() })
	var g errgroup.Group
	g.SetLimit(max(1, d.MaxParallel))
	for _, id := range here {
		if ctx.Err() == nil && (late || !c.drains.recently(node, id, time.Now())) {
			g.Go(func() error { c.drainOne(ctx, node, id, d, late); return nil })
		}
	}
	_ = g.Wait() // failures are in the progress
	waiting := c.copyAway(ctx, node)
	if len(waiting) > 0 && d.Force && (late || d.Deadline.IsZero()) {
		c.log.LogAttrs(ctx, slog.LevelWarn, "drained node keeps what no other node has", nodeAttr(node), slog.Any("what", waiting))
		waiting = nil
	}
	if n := c.builds.at(node); n > 0 {
		waiting = append(waiting, fmt.Sprintf("%d builds are under way", n))
	}
	left := c.index.at(node, func(e *entry) bool { return !e.box.State.Ended() })
	c.drains.change(node, func(g *draining) {
		g.left, g.waiting = len(left), waiting
		g.stuck = g.whyStuck(left, c.fleet.onlyOpen(node))
		for id := range g.failed {
			if !slices.Contains(left, id) {
				delete(g.failed, id)
			}
		}
	})
	return len(left) + len(waiting)
}

// whyStuck says why none of the sandboxes that are left can be moved; empty where one may be. alone means that there is no other
// node that gets new sandboxes.
func (g *draining) whyStuck(left []sandbox.ID, alone bool) string {
	if len(left) > 0 && alone {
		return "no other node gets new sandboxes: `cloister node uncordon` opens one, `cloister join` adds one, --force ends what is here"
	}
	first := ""
	for _, id := range left {
		f, ok := g.failed[id]
		if !ok || !f.hopeless {
			return ""
		}
		if first == "" {
			first = f.reason
		}
	}
	if first == "" {
		return ""
	}
	return first + "; this ends when there is room, or with --force, which ends what is left"
}

// onlyOpen reports whether no other node gets new sandboxes.
func (f *fleet) onlyOpen(node sandbox.NodeID) bool {
	return !slices.ContainsFunc(f.openNodes(), func(n sandbox.NodeID) bool { return n != node })
}

// drainOne moves one sandbox. What cannot be moved is ended where that is wanted.
func (c *Control) drainOne(ctx context.Context, node sandbox.NodeID, id sandbox.ID, d sandbox.NodeDrain, late bool) {
	_, err := c.move(ctx, id)
	if err == nil {
		c.drains.change(node, func(g *draining) { g.moved++; delete(g.failed, id) })
		return
	}
	if ctx.Err() != nil || errors.Is(err, sandbox.ErrNotFound) {
		return
	}
	if d.Force && (late || d.Deadline.IsZero() && hopeless(err)) {
		if err := c.Kill(ctx, id); err == nil {
			c.drains.change(node, func(g *draining) { g.ended++; delete(g.failed, id) })
			return
		}
	}
	c.log.LogAttrs(ctx, slog.LevelWarn, "sandbox not moved", slog.String("sandbox_id", string(id)), nodeAttr(node), errAttr(err))
	c.drains.change(node, func(g *draining) {
		g.failed[id] = failure{reason: err.Error(), at: time.Now(), hopeless: hopeless(err)}
	})
}

// hopeless reports whether trying again will not help by itself.
func hopeless(err error) bool {
	return !errors.Is(err, sandbox.ErrUnavailable) && !errors.Is(err, sandbox.ErrConflict)
}

// copyAway has other nodes get the templates and snapshots that only this one has, and says which they are.
func (c *Control) copyAway(ctx context.Context, node sandbox.NodeID) (left []string) {
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return []string{"the templates cannot be read: " + err.Error()}
	}
	for _, t := range all {
		for _, b := range t.Builds {
			if b.State != sandbox.BuildReady || !c.onlyAt(node, b) {
				continue
			}
			if err := c.copyBuildAway(ctx, node, t, b); err != nil {
				left = append(left, fmt.Sprintf("template %s is on no other node: %v", nameFor(t, string(t.ID)), err))
			}
		}
	}
	return left
}

// onlyAt reports whether a node has what a build's sandboxes start from, and no other node that goes on has it.
func (c *Control) onlyAt(node sandbox.NodeID, b sandbox.Build) bool {
	keys := []string{b.ImageDigest}
	if b.Checkpoint != "" {
		keys = append(keys, b.ID)
	}
	open := c.fleet.openNodes()
	for _, key := range keys {
		if key == "" || c.fleet.lacks(node, key) {
			continue
		}
		if !slices.ContainsFunc(c.fleet.holders(key), func(n sandbox.NodeID) bool { return n != node && slices.Contains(open, n) }) {
			return true
		}
	}
	return false
}

func (c *Control) copyBuildAway(ctx context.Context, node sandbox.NodeID, t sandbox.Template, b sandbox.Build) error {
	made := b.MadeOn
	if made == nil {
		made = c.fleet.machine(node)
	}
	err := sandbox.Unavailablef("there is no other node that could have it")
	for _, to := range c.fleet.openNodes() {
		n, ok := c.fleet.record(to)
		if !ok || to == node || b.Checkpoint == sandbox.CheckpointMemory && !n.Origin().Takes(made) {
			continue
		}
		work, cancel := context.WithTimeout(ctx, copyDeadline)
		err = c.copyBuild(work, job{node: to, template: t.ID, build: b})
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// endDrain notes that a drain is over: done, or given up for a reason.
func (c *Control) endDrain(ctx context.Context, node sandbox.NodeID, started time.Time, reason string) {
	now := time.Now().UTC()
	settings, err := c.settings.UpdateNodeSettings(ctx, node, func(s *sandbox.NodeSettings) error {
		if s.Drain.Active() && s.Drain.StartedAt.Equal(started) {
			d := *s.Drain
			d.DoneAt, d.Error = now, reason
			s.Drain = &d
		}
		return nil
	})
	if err != nil { // the next round tries again
		c.log.LogAttrs(ctx, slog.LevelWarn, "end of a drain not recorded", nodeAttr(node), errAttr(err))
		return
	}
	c.fleet.set(node, settings)
	e := Event{Type: "node_drained", NodeID: node, Message: fmt.Sprintf("node %s has nothing left", c.fleet.nameOf(node))}
	if reason != "" {
		e.Type, e.Message = "node_drain_failed", fmt.Sprintf("node %s could not be emptied: %s", c.fleet.nameOf(node), reason)
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "drain ended", nodeAttr(node), slog.String("reason", reason))
	c.note(ctx, e)
}

func (f *fleet) nameOf(id sandbox.NodeID) string {
	n, _ := f.record(id)
	setDefault(&n.Name, string(id))
	return n.Name
}

// at counts the builds that are under way at a node.
func (b *builds) at(node sandbox.NodeID) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, t := range b.known {
		if t.active && t.node == node {
			n++
		}
	}
	return n
}
