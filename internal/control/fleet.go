package control

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// Node is a node with what it last reported.
type Node struct {
	sandbox.Node
	Allocated  sandbox.Resources
	Sandboxes  int
	Creating   int
	Warm       int
	LastSeenAt time.Time
}

// member is what the server knows of one node. view holds what the scheduler reads.
type member struct {
	record   sandbox.Node
	epoch    int64
	acked    int64
	lastSeen time.Time
	load     Load
	// dispatched is what has been sent to the node and is in no load that it reported.
	dispatched sandbox.Resources
	inFlight   int
}

// Load is a node's use as it reported it.
type Load struct {
	Capacity  sandbox.Resources
	Allocated sandbox.Resources
	Sandboxes int
	Creating  int
	Warm      int
}

// loadFromWire reads a load; where it names no capacity, the known one stays.
func loadFromWire(w *agentv1.Load, capacity sandbox.Resources) Load {
	if w.GetCapacity() != nil {
		capacity = resourcesFromWire(w.GetCapacity())
	}
	return Load{
		Capacity: capacity, Allocated: resourcesFromWire(w.GetAllocated()),
		Sandboxes: int(w.GetSandboxes()), Creating: int(w.GetCreating()), Warm: int(w.GetWarm()),
	}
}

// sweepEvery is how often the silence of nodes is looked at.
const sweepEvery = time.Second

// fleet is the nodes of the cluster, as the scheduler sees them.
type fleet struct {
	policy scheduler.Policy
	limits Limits

	mu      sync.Mutex
	random  scheduler.Source
	members map[sandbox.NodeID]*member
	// views is what Place reads; at says where each node's view stands.
	views []scheduler.Node
	at    map[sandbox.NodeID]int
	swept time.Time
	epoch int64
}

func newFleet(policy scheduler.Policy, random scheduler.Source, limits Limits) *fleet {
	return &fleet{
		policy: policy, random: random, limits: limits,
		members: make(map[sandbox.NodeID]*member), at: make(map[sandbox.NodeID]int),
	}
}

// restore takes a node from the store; it is down until it registers.
func (f *fleet) restore(n sandbox.Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n.State = sandbox.NodeDown
	f.members[n.ID] = &member{record: n, load: Load{Capacity: n.Capacity}}
	f.refresh(n.ID, nil)
}

// register takes a node's registration and returns its epoch, which is higher than any before, also across restarts.
func (f *fleet) register(n sandbox.Node, images []string, now time.Time) (sandbox.Node, int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.epoch = max(f.epoch+1, now.UnixNano())
	n.RegisteredAt, n.State = now, sandbox.NodeReady
	m := &member{record: n, epoch: f.epoch, lastSeen: now, load: Load{Capacity: n.Capacity}}
	if old := f.members[n.ID]; old != nil {
		if !old.record.RegisteredAt.IsZero() {
			m.record.RegisteredAt = old.record.RegisteredAt
		}
		m.load = old.load
		m.load.Capacity = n.Capacity
		m.dispatched, m.inFlight = old.dispatched, old.inFlight
	}
	f.members[n.ID] = m
	set := make(map[string]struct{}, len(images))
	for _, d := range images {
		set[d] = struct{}{}
	}
	f.refresh(n.ID, set)
	return m.record, m.epoch
}

// refresh brings a node's view up to date; images is nil to keep what it has. It requires mu.
func (f *fleet) refresh(id sandbox.NodeID, images map[string]struct{}) {
	m := f.members[id]
	i, ok := f.at[id]
	if !ok {
		i = len(f.views)
		f.at[id] = i
		f.views = append(f.views, scheduler.Node{})
	}
	if images == nil {
		images = f.views[i].Images
	}
	f.views[i] = scheduler.Node{
		ID: id, State: m.record.State, Labels: m.record.Labels, Engines: m.record.Engines, Images: images,
		Capacity: m.load.Capacity, Allocated: m.load.Allocated.Add(m.dispatched),
		Creating: max(m.load.Creating, m.inFlight), Warm: m.load.Warm,
	}
}

// heard takes a node's report of its load. It is ErrConflict where the report is of another registration.
func (f *fleet) heard(id sandbox.NodeID, epoch int64, load *agentv1.Load, now time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || m.epoch != epoch || epoch == 0 {
		return sandbox.Conflictf("node %s: epoch %d is not its registration here: register again", id, epoch)
	}
	m.seen(now)
	if load != nil {
		m.load = loadFromWire(load, m.load.Capacity)
	}
	f.refresh(id, nil)
	return nil
}

// seen notes a sign of life.
func (m *member) seen(now time.Time) {
	m.lastSeen = now
	if m.epoch != 0 && (m.record.State == sandbox.NodeSuspect || m.record.State == sandbox.NodeDown) {
		m.record.State = sandbox.NodeReady
	}
}

// acknowledge remembers how far a node's changes are known, and returns how far that is.
func (f *fleet) acknowledge(id sandbox.NodeID, sequence int64) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return 0
	}
	m.acked = max(m.acked, sequence)
	return m.acked
}

func (f *fleet) epochOf(id sandbox.NodeID) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return m.epoch
	}
	return 0
}

// dispatch notes that a sandbox is being created at a node, until the returned function is called with the load that
// the node answered, or nil.
func (f *fleet) dispatch(id sandbox.NodeID, r sandbox.Resources) (done func(*agentv1.Load)) {
	f.send(id, r, 1, nil)
	return func(load *agentv1.Load) { f.send(id, sandbox.Resources{}.Sub(r), -1, load) }
}

// answered takes the load that a node sent along with an answer; nil says nothing.
func (f *fleet) answered(id sandbox.NodeID, load *agentv1.Load) {
	f.send(id, sandbox.Resources{}, 0, load)
}

func (f *fleet) send(id sandbox.NodeID, r sandbox.Resources, n int, load *agentv1.Load) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return
	}
	m.dispatched, m.inFlight = m.dispatched.Add(r), m.inFlight+n
	if load != nil { // an answer is as good a sign of life as a report
		m.seen(time.Now())
		m.load = loadFromWire(load, m.load.Capacity)
	}
	f.refresh(id, nil)
}

// place asks the scheduler. The views are read in place, under the lock: Place is pure and takes microseconds.
func (f *fleet) place(r scheduler.Request, now time.Time) scheduler.Decision {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sweep(now)
	r.Random = f.random
	return scheduler.Place(scheduler.Snapshot{Nodes: f.views, Policy: f.policy}, r)
}

// sweep marks the nodes that have been silent for too long. It requires mu.
func (f *fleet) sweep(now time.Time) {
	if now.Sub(f.swept) < sweepEvery {
		return
	}
	f.swept = now
	for id, m := range f.members {
		silent := now.Sub(m.lastSeen)
		next := m.record.State
		switch {
		case next != sandbox.NodeReady && next != sandbox.NodeSuspect:
			continue // set by somebody, or down already
		case silent >= f.limits.DownAfter:
			next = sandbox.NodeDown
		case silent >= f.limits.SuspectAfter:
			next = sandbox.NodeSuspect
		default:
			next = sandbox.NodeReady
		}
		if next != m.record.State {
			m.record.State = next
			f.refresh(id, nil)
		}
	}
}

// setImage notes that a node has an image, or no longer has it.
func (f *fleet) setImage(id sandbox.NodeID, digest string, there bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i, ok := f.at[id]
	if !ok || digest == "" {
		return
	}
	images := maps.Clone(f.views[i].Images) // decisions may still refer to the old one
	if images == nil {
		images = make(map[string]struct{})
	}
	if there {
		images[digest] = struct{}{}
	} else {
		delete(images, digest)
	}
	f.views[i].Images = images
}

// holders returns the nodes that are ready and have the image.
func (f *fleet) holders(digest string) []sandbox.NodeID {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []sandbox.NodeID
	for i := range f.views {
		if _, ok := f.views[i].Images[digest]; ok && f.views[i].State == sandbox.NodeReady {
			out = append(out, f.views[i].ID)
		}
	}
	return out
}

// list returns all nodes in order of name, then id.
func (f *fleet) list(now time.Time) []Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sweep(now)
	out := make([]Node, 0, len(f.members))
	for _, m := range f.members {
		n := Node{
			Node: m.record, Allocated: m.load.Allocated, Sandboxes: m.load.Sandboxes, Creating: m.load.Creating,
			Warm: m.load.Warm, LastSeenAt: m.lastSeen,
		}
		n.Capacity = m.load.Capacity
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// ListNodes returns all nodes that ever registered, in order of name.
func (c *Control) ListNodes(context.Context) ([]Node, error) { return c.fleet.list(time.Now()), nil }

// GetNode returns a node by id or, where only one has it, by name.
func (c *Control) GetNode(_ context.Context, idOrName string) (Node, error) {
	var named []Node
	for _, n := range c.fleet.list(time.Now()) {
		if string(n.ID) == idOrName {
			return n, nil
		}
		if n.Name == idOrName {
			named = append(named, n)
		}
	}
	switch len(named) {
	case 0:
		return Node{}, sandbox.NotFoundf("node %.80q does not exist", idOrName)
	case 1:
		return named[0], nil
	}
	return Node{}, sandbox.Invalidf("%d nodes are named %q: use the id of one", len(named), idOrName)
}

// has reports whether a node has ever registered.
func (f *fleet) has(id sandbox.NodeID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.members[id] != nil
}
