package control

import (
	"cmp"
	"maps"
	"slices"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// maxPeers bounds the nodes that are named to one that lacks something.
const maxPeers = 4

// haves notes the difference between what a node had and has. It requires mu.
func (f *fleet) haves(id sandbox.NodeID, before, after map[string]struct{}) {
	for what := range before {
		if _, ok := after[what]; ok {
			continue
		}
		if delete(f.having[what], id); len(f.having[what]) == 0 {
			delete(f.having, what)
		}
	}
	for what := range after {
		nodes := f.having[what]
		if nodes == nil {
			nodes = make(map[sandbox.NodeID]struct{})
			f.having[what] = nodes
		}
		nodes[id] = struct{}{}
	}
}

// fetchable reports whether a node that lacks something could get it from another. It requires mu.
func (f *fleet) fetchable(what string) bool {
	for id := range f.having[what] {
		if f.members[id].state == sandbox.NodeReady {
			return true
		}
	}
	return false
}

// holders returns the nodes that are ready, cordoned ones included, and have an image or a checkpoint; in order of id.
func (f *fleet) holders(what string) []sandbox.NodeID {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []sandbox.NodeID
	for id := range f.having[what] {
		if f.members[id].state == sandbox.NodeReady {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// lacks reports whether a node has to get something before it can start from it.
func (f *fleet) lacks(id sandbox.NodeID, what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if what == "" {
		return false
	}
	_, has := f.having[what][id]
	return !has
}

// peers returns whom a node can get something from, the best first: those that it can dial and that are the least used.
func (f *fleet) peers(to sandbox.NodeID, what string) []*agentv1.Peer {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]*member, 0, len(f.having[what]))
	for id := range f.having[what] {
		if m := f.members[id]; id != to && m.state == sandbox.NodeReady {
			all = append(all, m)
		}
	}
	unreachable := func(m *member) int { return btoi(m.record.Address == "") }
	slices.SortFunc(all, func(a, b *member) int {
		return cmp.Or(cmp.Compare(unreachable(a), unreachable(b)), cmp.Compare(a.load.UsedCPU, b.load.UsedCPU), cmp.Compare(a.record.ID, b.record.ID))
	})
	out := make([]*agentv1.Peer, 0, maxPeers)
	for _, m := range all[:min(maxPeers, len(all))] {
		out = append(out, &agentv1.Peer{NodeId: string(m.record.ID), Address: m.record.Address})
	}
	return out
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// peer is how other nodes reach a node.
func (f *fleet) peer(id sandbox.NodeID) *agentv1.Peer {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &agentv1.Peer{NodeId: string(id)}
	if m := f.members[id]; m != nil {
		p.Address = m.record.Address
	}
	return p
}

// record returns what a node said of itself and the state that it is in.
func (f *fleet) record(id sandbox.NodeID) (n sandbox.Node, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return sandbox.Node{}, false
	}
	n = m.record
	n.State, n.Labels = m.state, m.labels
	return n, true
}

// machine returns what is saved on a node depends on; nil where the node is not known.
func (f *fleet) machine(id sandbox.NodeID) *sandbox.Origin {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return m.machine
	}
	return nil
}

// isDown reports whether a node is known and does not answer: also one whose lease says that it lives, but that has not
// registered with this server yet.
func (f *fleet) isDown(id sandbox.NodeID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	return m != nil && (m.state == sandbox.NodeDown || m.epoch == 0)
}

// isReady reports whether a node answers.
func (f *fleet) isReady(id sandbox.NodeID) bool {
	n, ok := f.record(id)
	return ok && n.State == sandbox.NodeReady
}

// givenUp reports whether a node has been silent for so long that its paused sandboxes are brought back elsewhere. A
// server that has just started does not know for how long. It requires mu.
func (f *fleet) givenUp(m *member, now time.Time) bool {
	return m.state == sandbox.NodeDown && (m.epoch != 0 || now.Sub(m.restoredAt) >= 2*f.limits.DownAfter)
}

// openNodes lists the nodes that are ready and get new sandboxes.
func (f *fleet) openNodes() []sandbox.NodeID {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []sandbox.NodeID
	for i := range f.views {
		if f.views[i].State == sandbox.NodeReady && !f.views[i].Cordoned {
			out = append(out, f.views[i].ID)
		}
	}
	slices.Sort(out)
	return out
}

// placeAmong asks the scheduler about the nodes that may says yes to.
func (f *fleet) placeAmong(r scheduler.Request, now time.Time, may func(sandbox.Node) bool) scheduler.Decision {
	f.mu.Lock()
	defer f.mu.Unlock()
	views := make([]scheduler.Node, 0, len(f.views))
	for i := range f.views {
		if may(f.members[f.views[i].ID].record) {
			views = append(views, f.views[i])
		}
	}
	r.Random, r.Now = f.random, now
	return scheduler.Place(scheduler.Snapshot{Nodes: views, Policy: f.policy}, r)
}

// remove forgets a node.
func (f *fleet) remove(id sandbox.NodeID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, ok := f.at[id]
	if !ok {
		return
	}
	f.routes.dropNode(id)
	f.haves(id, f.views[i].Images, nil)
	last := len(f.views) - 1
	f.views[i] = f.views[last]
	f.at[f.views[i].ID] = i
	f.views[last] = scheduler.Node{}
	f.views = f.views[:last]
	delete(f.at, id)
	delete(f.members, id)
}

// settingsOf returns what the administrator set for each node.
func (f *fleet) settingsOf() map[sandbox.NodeID]sandbox.NodeSettings {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[sandbox.NodeID]sandbox.NodeSettings, len(f.members))
	for id, m := range f.members {
		out[id] = m.settings
	}
	return out
}

// cut notes that the link to a node broke: it gets nothing new until its next report.
func (f *fleet) cut(id sandbox.NodeID, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil && m.state == sandbox.NodeReady {
		f.turn(m, sandbox.NodeSuspect, now)
		f.refresh(id, nil)
	}
}

// images returns what a node has.
func (f *fleet) images(id sandbox.NodeID) map[string]struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i, ok := f.at[id]; ok {
		return maps.Clone(f.views[i].Images)
	}
	return nil
}

// toldAll notes that a node has told of everything that it has.
func (f *fleet) toldAll(id sandbox.NodeID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		m.told = true
		if !m.known {
			m.known = true
			f.refresh(id, nil)
		}
	}
}
