package control

import (
	"cmp"
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
	// Settings is what the administrator set. Labels are the node's own with those over them.
	Settings sandbox.NodeSettings
	// StateAt is when the node's state changed last.
	StateAt time.Time
	// Failures is what went wrong there lately, as far as it still counts.
	Failures float64
	// UsedCPU, UsedMemory and UsedDisk are how much of the machine is in use, 0 to 1; 0 where that is not known.
	UsedCPU    float64
	UsedMemory float64
	UsedDisk   float64
	// Drain is how far the node has been emptied; nil where it was not told to be, or by another process.
	Drain *DrainProgress
}

// member is what the server knows of one node.
type member struct {
	record sandbox.Node
	// machine is the record's, for the scheduler.
	machine *sandbox.Origin
	// state is what the node's reports, or their absence, say: ready, suspect or down.
	state    sandbox.NodeState
	stateAt  time.Time
	settings sandbox.NodeSettings
	// labels are the node's own, the cluster's and the administrator's. It is replaced, never changed.
	labels   map[string]string
	failures scheduler.Failures
	epoch    int64
	acked    int64
	// told means that a full report came under this registration.
	told bool
	// known means that a full report came since this server started, missed that it should have registered since; leased that
	// it has a lease.
	known, missed, leased bool
	// restoredAt is when it was taken from the store.
	restoredAt time.Time
	lastSeen   time.Time
	load       Load
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
	// UsedCPU, UsedMemory and UsedDisk are how much of the machine is in use, 0 to 1.
	UsedCPU    float64
	UsedMemory float64
	UsedDisk   float64
}

// loadFromWire reads a load; where it names no capacity, the known one stays.
func loadFromWire(w *agentv1.Load, capacity sandbox.Resources) Load {
	if w.GetCapacity() != nil {
		capacity = resourcesFromWire(w.GetCapacity())
	}
	return Load{
		Capacity: capacity, Allocated: resourcesFromWire(w.GetAllocated()),
		Sandboxes: int(w.GetSandboxes()), Creating: int(w.GetCreating()), Warm: int(w.GetWarm()),
		UsedCPU: w.GetUsedCpu(), UsedMemory: w.GetUsedMemory(), UsedDisk: w.GetUsedDisk(),
	}
}

// fleet is the nodes of the cluster, as the scheduler sees them.
type fleet struct {
	limits Limits
	routes *routeLog // is told how nodes are reached

	mu sync.Mutex
	// policy is in force: configured, unless stored says that one was set through the API.
	policy     scheduler.Policy
	configured scheduler.Policy
	stored     bool
	random     scheduler.Source
	members    map[sandbox.NodeID]*member
	// views is what Place reads; at says where each node's view stands.
	views []scheduler.Node
	at    map[sandbox.NodeID]int
	// having says which nodes have an image or a checkpoint, in whatever state.
	having map[string]map[sandbox.NodeID]struct{}
	epoch  int64
	// next is where round_robin goes on, homes where sticky keys were last.
	next  int
	homes *homes
	// turns are the changes of state that nobody was told of yet.
	turns []turn
	// clocks has a mutex of its own.
	clocks *clocks
}

func newFleet(policy scheduler.Policy, random scheduler.Source, limits Limits) *fleet {
	return &fleet{
		policy: policy, configured: policy, random: random, limits: limits,
		members: make(map[sandbox.NodeID]*member), at: make(map[sandbox.NodeID]int), homes: newHomes(),
		having: make(map[string]map[sandbox.NodeID]struct{}), clocks: newClocks(),
	}
}

// restore takes a node from the store; it is down until it registers.
func (f *fleet) restore(n sandbox.Node, settings sandbox.NodeSettings, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := &member{record: n, machine: n.Origin(), state: sandbox.NodeDown, stateAt: now, restoredAt: now, settings: settings, load: Load{Capacity: n.Capacity}}
	m.label()
	f.members[n.ID] = m
	f.refresh(n.ID, nil)
}

// register takes a node's registration and returns its epoch, which is higher than any before, also across restarts.
func (f *fleet) register(n sandbox.Node, images []string, now time.Time) (sandbox.Node, int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.epoch = max(f.epoch+1, now.UnixNano())
	n.RegisteredAt, n.State = now.UTC(), sandbox.NodeReady
	m := &member{
		record: n, machine: n.Origin(), state: sandbox.NodeReady, stateAt: now, epoch: f.epoch, lastSeen: time.Now(), load: Load{Capacity: n.Capacity},
	}
	if old := f.members[n.ID]; old != nil {
		if !old.record.RegisteredAt.IsZero() {
			m.record.RegisteredAt = old.record.RegisteredAt
		}
		m.load = old.load
		m.load.Capacity = n.Capacity
		m.dispatched, m.inFlight, m.settings = old.dispatched, old.inFlight, old.settings
		m.state, m.stateAt, m.known = old.state, old.stateAt, old.known
	}
	m.label()
	f.members[n.ID] = m
	f.turn(m, sandbox.NodeReady, now)
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
	f.routes.setNode(sandbox.NodeRoute{
		ID: id, Address: m.record.Address, Down: m.state == sandbox.NodeDown && (m.epoch != 0 || m.missed), Unheard: !m.known,
	})
	i, ok := f.at[id]
	if !ok {
		i = len(f.views)
		f.at[id] = i
		f.views = append(f.views, scheduler.Node{})
	}
	if images == nil {
		images = f.views[i].Images
	} else {
		f.haves(id, f.views[i].Images, images)
	}
	f.views[i] = scheduler.Node{
		ID: id, State: m.state, Cordoned: m.settings.Cordoned, Labels: m.labels, Taints: m.settings.Taints,
		Engines: m.record.Engines, Machine: m.machine, Images: images,
		Capacity: m.load.Capacity, Allocated: m.load.Allocated.Add(m.dispatched), Sandboxes: m.load.Sandboxes + m.inFlight,
		Creating: max(m.load.Creating, m.inFlight), Warm: m.load.Warm, Failures: m.failures,
		UsedCPU: m.load.UsedCPU, UsedMemory: m.load.UsedMemory,
	}
}

// heard takes a node's report of its load, and says whether the node was down until then. It is ErrConflict where the
// report is of another registration.
func (f *fleet) heard(id sandbox.NodeID, epoch int64, load *agentv1.Load, now time.Time) (back bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || m.epoch != epoch || epoch == 0 {
		return false, sandbox.Conflictf("node %s: epoch %d is not its registration here: register again", id, epoch)
	}
	back = m.state == sandbox.NodeDown
	f.seen(m, now)
	if load != nil {
		m.load = loadFromWire(load, m.load.Capacity)
	}
	f.refresh(id, nil)
	return back, nil
}

// seen notes a sign of life. It requires mu.
func (f *fleet) seen(m *member, now time.Time) {
	m.lastSeen = time.Now() // by the clock that nobody sets: now, in UTC, has that no more
	if m.epoch != 0 {
		f.turn(m, sandbox.NodeReady, now)
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

// recordOf returns what a node registered as.
func (f *fleet) recordOf(id sandbox.NodeID) *sandbox.Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		n := m.record
		return &n
	}
	return &sandbox.Node{ID: id}
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
		f.seen(m, time.Now())
		m.load = loadFromWire(load, m.load.Capacity)
	}
	f.refresh(id, nil)
}

// place asks the scheduler. The views are read in place, under the lock: Place is pure and takes microseconds.
func (f *fleet) place(r scheduler.Request, now time.Time) scheduler.Decision {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.prepare(&r, now)
	d := scheduler.Place(scheduler.Snapshot{Nodes: f.views, Policy: f.policy}, r)
	f.next = d.Next
	return d
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
	f.haves(id, f.views[i].Images, images)
	f.views[i].Images = images
}

// list returns all nodes in order of name, then id.
func (f *fleet) list(now time.Time) []Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Node, 0, len(f.members))
	for _, m := range f.members {
		out = append(out, f.node(m, now))
	}
	slices.SortFunc(out, func(a, b Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// has reports whether a node has ever registered.
func (f *fleet) has(id sandbox.NodeID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.members[id] != nil
}
