package control

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// sweepEvery is how often the silence of nodes is looked at.
const sweepEvery = time.Second

// linkWithin is how long a node may take to find a server again that was away: the longest wait between two attempts, and the
// time to register.
const linkWithin = 8 * time.Second

// maxTurns bounds the changes of state that wait to be told; the oldest are dropped.
const maxTurns = 1024

// turn is a change of a node's state.
type turn struct {
	node sandbox.NodeID
	name string
	from sandbox.NodeState
	to   sandbox.NodeState
	at   time.Time
	// silent is how long nothing was heard of the node.
	silent time.Duration
}

// turn changes a node's state and keeps the change to be told. It requires mu.
func (f *fleet) turn(m *member, to sandbox.NodeState, now time.Time) {
	if m.state == to {
		return
	}
	if len(f.turns) == maxTurns {
		f.turns = f.turns[1:]
	}
	t := turn{node: m.record.ID, name: m.record.Name, from: m.state, to: to, at: now}
	if !m.lastSeen.IsZero() {
		t.silent = now.Sub(m.lastSeen)
	}
	f.turns = append(f.turns, t)
	m.state, m.stateAt = to, now
}

// sweep marks the nodes that have been silent for too long and returns every change of state since the last call. stalled
// is how long this process itself did nothing, which is no silence of the nodes.
func (f *fleet) sweep(now time.Time, stalled time.Duration) []turn {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, m := range f.members {
		if m.epoch == 0 { // restored from the store and not heard of yet: down, but traffic to it may go on for a while
			if !m.missed && !m.leased && now.Sub(m.restoredAt) >= max(f.limits.DownAfter, linkWithin) {
				m.missed = true
				f.turn(m, sandbox.NodeDown, now)
				f.refresh(id, nil)
			}
			continue
		}
		m.lastSeen = m.lastSeen.Add(min(stalled, max(0, now.Sub(m.lastSeen))))
		state := f.limits.stateAfter(now.Sub(m.lastSeen))
		if state != m.state && state != sandbox.NodeReady {
			f.turn(m, state, now)
			f.refresh(id, nil)
		}
	}
	out := f.turns
	f.turns = nil
	return out
}

// leased notes that a node's lease is there, or has ended. For one that has not registered with this server yet, that is all
// that is known of it; of the others their reports say more.
func (f *fleet) leased(id sandbox.NodeID, there bool, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return
	}
	m.leased = there
	if there && m.epoch == 0 && !m.missed {
		f.turn(m, sandbox.NodeSuspect, now)
		f.refresh(id, nil)
	}
}

// stateAfter returns the state of a node that has been silent for so long.
func (l Limits) stateAfter(silent time.Duration) sandbox.NodeState {
	switch {
	case silent >= l.DownAfter:
		return sandbox.NodeDown
	case silent >= l.SuspectAfter:
		return sandbox.NodeSuspect
	}
	return sandbox.NodeReady
}

// watchNodes looks for silent nodes and tells of every change of a node's state, until ctx ends.
func (c *Control) watchNodes(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		var stalled time.Duration
		if gap := now.Sub(last); gap > 2*sweepEvery {
			stalled = gap - sweepEvery
		}
		for _, t := range c.fleet.sweep(now, stalled) {
			c.tellTurn(ctx, t)
			c.heedTurn(ctx, t)
		}
		last = now
	}
}

func (c *Control) tellTurn(ctx context.Context, t turn) {
	level := slog.LevelInfo
	message := fmt.Sprintf("node %s is %s", t.name, t.to)
	if t.to != sandbox.NodeReady {
		level = slog.LevelWarn
		message += fmt.Sprintf(": silent for %s", t.silent.Round(time.Second))
	}
	c.log.LogAttrs(ctx, level, "node changed its state", nodeAttr(t.node), slog.String("from", string(t.from)),
		slog.String("to", string(t.to)), slog.Duration("silent", t.silent))
	c.note(ctx, Event{
		Type: "node_" + string(t.to), NodeID: t.node, Message: message,
		Fields: map[string]string{"from": string(t.from), "at": t.at.UTC().Format(time.RFC3339Nano)},
	})
}

// Labels that the cluster sets on every node.
const (
	labelNode = sandbox.OwnLabels + "node"
	labelName = sandbox.OwnLabels + "hostname"
	labelArch = sandbox.OwnLabels + "arch"
)

// label joins the labels of a node: its own, the administrator's over them, and the cluster's.
func (m *member) label() {
	all := make(map[string]string, len(m.record.Labels)+len(m.settings.Labels)+3)
	maps.Copy(all, m.record.Labels)
	maps.Copy(all, m.settings.Labels)
	all[labelNode], all[labelName], all[labelArch] = string(m.record.ID), m.record.Name, m.record.Architecture
	m.labels = all
}

// node returns what is known of a member. It requires mu.
func (f *fleet) node(m *member, now time.Time) Node {
	n := Node{
		Node: m.record, Allocated: m.load.Allocated, Sandboxes: m.load.Sandboxes, Creating: m.load.Creating,
		Warm: m.load.Warm, LastSeenAt: m.lastSeen.UTC(), Settings: m.settings.Clone(), StateAt: m.stateAt.UTC(),
		Failures: m.failures.Now(now, f.halfLife()), UsedCPU: m.load.UsedCPU, UsedMemory: m.load.UsedMemory, UsedDisk: m.load.UsedDisk,
	}
	n.Capacity, n.State, n.Labels = m.load.Capacity, m.state, maps.Clone(m.labels)
	if n.State == sandbox.NodeReady {
		state, at := wantedState(&m.settings)
		n.State = state
		if at.After(n.StateAt) {
			n.StateAt = at
		}
	}
	return n
}

// wantedState returns the state that the administrator gives a node which is ready, and since when; the zero time where it always was.
func wantedState(s *sandbox.NodeSettings) (sandbox.NodeState, time.Time) {
	switch {
	case !s.Cordoned:
		return sandbox.NodeReady, s.CordonedAt
	case s.Drain.Active():
		return sandbox.NodeDraining, s.Drain.StartedAt
	case s.Drain.Drained():
		return sandbox.NodeDrained, s.Drain.DoneAt
	}
	return sandbox.NodeCordoned, s.CordonedAt
}

// set takes the administrator's settings for a node.
func (f *fleet) set(id sandbox.NodeID, settings sandbox.NodeSettings) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		m.settings = settings
		m.label()
		f.refresh(id, nil)
	}
}

// open returns ErrConflict where a node takes no new sandboxes because it is cordoned.
func (f *fleet) open(id sandbox.NodeID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil && m.settings.Cordoned {
		return sandbox.Conflictf("node %s is cordoned and takes no new sandboxes: `cloister node uncordon %s` opens it", m.record.Name, m.record.Name)
	}
	return nil
}

// halfLife requires mu.
func (f *fleet) halfLife() time.Duration { return f.policy.WithDefaults().FailureHalfLife }

// outcome notes how a node answered a create.
func (f *fleet) outcome(id sandbox.NodeID, failed bool, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || (!failed && m.failures == scheduler.Failures{}) {
		return
	}
	if failed {
		m.failures = m.failures.Failed(now, f.halfLife())
	} else {
		m.failures = m.failures.Succeeded(now, f.halfLife())
	}
	f.refresh(id, nil)
}
