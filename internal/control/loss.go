package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// NodeUnreachable notes that the link to a node broke. It gets no new sandboxes until it reports again, and counts as
// silent from its last report on.
func (c *Control) NodeUnreachable(id sandbox.NodeID) { c.fleet.cut(id, time.Now().UTC()) }

// NodeReachable notes that a node has a link again. It is ready with its next report; what waited for it goes on at once.
func (c *Control) NodeReachable(sandbox.NodeID) { c.strays.kick() }

// heedTurn draws the conclusions of a change of a node's state.
func (c *Control) heedTurn(ctx context.Context, t turn) {
	switch {
	case t.to == sandbox.NodeDown:
		c.lose(ctx, t)
	case t.from == sandbox.NodeDown && t.to == sandbox.NodeReady:
		c.revive(ctx, t.node)
	}
}

// lose marks what ran on a node that is down as lost. It is not given up: it runs on if the node was only cut off, and
// nothing of it is started elsewhere.
func (c *Control) lose(ctx context.Context, t turn) {
	now := time.Now().UTC()
	reason := fmt.Sprintf("its node %s does not answer since %s", t.name, now.Add(-t.silent).Format(time.DateTime+" MST"))
	var events []Event
	for _, id := range c.index.at(t.node, runsThere) {
		c.index.change(id, now, func(e *entry) bool {
			if e.box.NodeID != t.node || !runsThere(e) {
				return false
			}
			e.was = e.box.State
			e.box.State, e.box.Reason, e.box.EndedAt = sandbox.StateLost, reason, now
			events = append(events, Event{Time: now, Type: "lost", NodeID: t.node, SandboxID: id, Message: reason})
			return true
		})
	}
	c.keep(ctx, events)
}

// runsThere reports whether a sandbox is lost with its node. One that is paused is not; one that is being moved is settled by
// its placement.
func runsThere(e *entry) bool {
	switch e.box.State {
	case sandbox.StateRunning, sandbox.StateCreating, sandbox.StatePausing, sandbox.StateResuming, sandbox.StateStopping:
		return true
	case sandbox.StatePaused, sandbox.StateStopped, sandbox.StateMigrating, sandbox.StateLost, sandbox.StateFailed, sandbox.StateDeleted:
	}
	return false
}

// lostThere reports whether a sandbox counts as lost because its node does not answer.
func lostThere(e *entry) bool { return e.was != "" }

// mayReturn reports whether a sandbox counts as lost until its node says what it has.
func (x *index) mayReturn(id sandbox.ID) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	return ok && lostThere(e)
}

// revive takes back what was concluded from a node's silence.
func (c *Control) revive(ctx context.Context, node sandbox.NodeID) {
	now := time.Now().UTC()
	var events []Event
	for _, id := range c.index.at(node, lostThere) {
		c.index.change(id, now, func(e *entry) bool {
			if e.box.NodeID != node || !lostThere(e) {
				return false
			}
			e.box.State, e.box.Reason, e.box.EndedAt, e.was = e.was, "", time.Time{}, ""
			events = append(events, Event{Time: now, Type: "found", NodeID: node, SandboxID: id, Message: "its node answers again"})
			return true
		})
	}
	c.keep(ctx, events)
}

// keep keeps events of the server's own.
func (c *Control) keep(ctx context.Context, events []Event) {
	if len(events) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	if err := c.history.Append(ctx, events); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "events not kept", slog.Int("count", len(events)), errAttr(err))
	}
}

// at returns the listed sandboxes of a node that are wanted.
func (x *index) at(node sandbox.NodeID, want func(*entry) bool) []sandbox.ID {
	var out []sandbox.ID
	first, _ := ends()
	x.scan(false, first, func(e *entry) bool {
		if e.box.NodeID == node && want(e) {
			out = append(out, e.box.ID)
		}
		return true
	})
	return out
}

// pausedBoxes returns the sandboxes that are paused.
func (x *index) pausedBoxes() []sandbox.Sandbox {
	x.mu.RLock()
	defer x.mu.RUnlock()
	out := make([]sandbox.Sandbox, 0, len(x.paused))
	for id := range x.paused {
		out = append(out, x.byID[id].box)
	}
	return out
}

// away says why a sandbox cannot be used whose node does not answer.
func (c *Control) away(box sandbox.Sandbox) error {
	if box.Reason != "" {
		return sandbox.Unavailablef("sandbox %s cannot be reached: %s", box.ID, box.Reason)
	}
	return sandbox.Unavailablef("sandbox %s cannot be reached: its node %s does not answer", box.ID, box.NodeID)
}

// killLater has a sandbox killed when its node answers again, or its move is known to be over; for everybody else it is gone
// from now on.
func (c *Control) killLater(ctx context.Context, box sandbox.Sandbox) error {
	k := sandbox.KillIntent{ID: box.ID, Node: box.NodeID, At: time.Now().UTC()}
	return c.putKill(ctx, k, "killed while its node did not answer", "killed as soon as its node answers")
}

// putKill has a sandbox killed wherever it is, also by the next server; reason is what is said of it from now on.
func (c *Control) putKill(ctx context.Context, k sandbox.KillIntent, reason, told string) error {
	if err := c.intents.PutKillIntent(ctx, k); err != nil {
		return fmt.Errorf("kill sandbox %s: %w", k.ID, err)
	}
	c.noted.setKill(k.ID, &k)
	c.buried(k.ID, reason)
	c.note(ctx, Event{Type: "kill_wanted", NodeID: k.Node, SandboxID: k.ID, Message: told})
	c.strays.kick()
	return nil
}

// buried notes that a sandbox is no more, whatever its node says from now on.
func (c *Control) buried(id sandbox.ID, reason string) {
	now := time.Now().UTC()
	c.index.change(id, now, func(e *entry) bool {
		e.final, e.was = true, ""
		if e.box.State == sandbox.StateDeleted {
			return true // the node's report was faster
		}
		e.box.Generation++
		e.box.State, e.box.Reason, e.box.EndedAt = sandbox.StateDeleted, reason, now
		return true
	})
}

// killWanted carries out an intent: copies of the sandbox end where they can be reached. Once every node has answered that may
// have the one that counts, nothing is noted any more but who may have an old one.
func (c *Control) killWanted(ctx context.Context, k sandbox.KillIntent) error {
	release, ok := c.busy.try(k.ID)
	if !ok {
		return nil // it is being moved, and found where it went
	}
	defer release()
	reached, all := c.reach(k)
	for _, node := range reached {
		if err := c.endCopy(ctx, k.ID, node); err != nil {
			return err
		}
	}
	if !all {
		return nil
	}
	if r, ok := c.noted.replica(k.ID); ok { // also one that was to bring it back: that is ended
		if err := c.replicas.RemoveReplica(ctx, r); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return errors.Join(fmt.Errorf("give up the replicas of sandbox %s: %w", k.ID, err), c.reloadReplica(ctx, k.ID))
		}
		c.noted.setReplica(k.ID, nil)
	}
	err := c.changePlacement(ctx, k.ID, func(p *sandbox.Placement) bool { p.Ended = true; return len(p.Stale) > 0 })
	if err != nil {
		return err
	}
	// A report that was written before must not bring it back, also where this server never knew it.
	now := time.Now().UTC()
	c.buried(k.ID, killReason)
	c.index.apply(&entry{final: true, box: sandbox.Sandbox{ID: k.ID, NodeID: k.Node, State: sandbox.StateDeleted, Reason: killReason, EndedAt: now}}, now)
	if err := c.intents.DeleteKillIntent(ctx, k.ID); err != nil {
		return fmt.Errorf("forget the intent to kill sandbox %s: %w", k.ID, err)
	}
	c.noted.setKill(k.ID, nil)
	return nil
}

// reach returns the nodes at which something of a sandbox that is to be killed can be ended now. All means that these are all
// that may have the copy that counts; as long as one does not answer, only copies that are known are ended.
func (c *Control) reach(k sandbox.KillIntent) (reached []sandbox.NodeID, all bool) {
	wanted := []sandbox.NodeID{k.Node}
	if p, ok := c.noted.placement(k.ID); ok && p.Node != k.Node {
		wanted = append(wanted, p.Node)
	}
	all = true
	for _, node := range wanted {
		if _, known := c.fleet.record(node); known && !c.fleet.isReady(node) {
			all = false
		}
	}
	for _, one := range c.strays.of(k.ID) {
		wanted = append(wanted, one.box.NodeID)
		if !all {
			reached = append(reached, one.box.NodeID)
		}
	}
	if all {
		reached = wanted
	}
	slices.Sort(reached)
	return slices.DeleteFunc(slices.Compact(reached), func(n sandbox.NodeID) bool { return !c.fleet.isReady(n) }), all
}
