package apitest

import (
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// moving is what a Node knows of other nodes' sandboxes, and how its commands fail. The Node's mutex guards it.
type moving struct {
	agents *Agents
	images map[string]bool
	// replicas are sandboxes of other nodes, by the checkpoint that they are paused in.
	replicas map[string]*agentv1.Sandbox
	guarded  map[string]bool
	running  map[string]bool
	faults   map[string]Fault
	calls    []string
	warmed   []string
	arrivals map[string]int
}

// Fault is how a command of a Node fails.
type Fault struct {
	Err error
	// After has it carried out all the same, so that the caller cannot know.
	After bool
	// Times is how often; 0 means always.
	Times int
}

// FailOn makes the command of that name, as in "Depart", fail; a zero Fault ends that.
func (n *Node) FailOn(command string, f Fault) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.moving.faults == nil {
		n.moving.faults = make(map[string]Fault)
	}
	if f.Err == nil {
		delete(n.moving.faults, command)
		return
	}
	n.moving.faults[command] = f
}

// Calls returns the commands about moves and copies that reached the node, in their order.
func (n *Node) Calls() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.moving.calls)
}

// Replicas returns the checkpoints that the node keeps for others, in order.
func (n *Node) Replicas() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]string, 0, len(n.moving.replicas))
	for id := range n.moving.replicas {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// Warmed returns the images that the node was asked to keep warm sandboxes of.
func (n *Node) Warmed() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.moving.warmed)
}

// Has returns the state of a sandbox, or "" where the node has none of that id.
func (n *Node) Has(id sandbox.ID) agentv1.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.boxes[string(id)].GetState()
}

// SetImages says which images the node has; without it, it has that of the base template.
func (n *Node) SetImages(digests ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.moving.images = make(map[string]bool)
	for _, d := range digests {
		n.moving.images[d] = true
	}
}

// imageDigests requires mu.
func (n *Node) imageDigests() []string {
	if n.moving.images == nil {
		return []string{BaseDigest}
	}
	var out []string
	for d := range n.moving.images {
		out = append(out, d)
	}
	slices.Sort(out)
	return out
}

// command notes a call and fails as FailOn said. do requires mu and carries it out.
func (n *Node) command(name, about string, do func() error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.moving.calls = append(n.moving.calls, name+" "+about)
	if n.err != nil {
		return n.err
	}
	f, ok := n.moving.faults[name]
	if ok && f.Times > 0 {
		if f.Times--; f.Times == 0 {
			delete(n.moving.faults, name)
		} else {
			n.moving.faults[name] = f
		}
	}
	if ok && !f.After {
		return f.Err
	}
	if err := do(); err != nil || !ok {
		return err
	}
	return f.Err
}

func notHere(what string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("%s is not here", what))
}

// Fetch implements agent.v1: it looks whether one of the peers has what is wanted.
func (n *Node) Fetch(_ context.Context, req *agentv1.FetchRequest) (*agentv1.FetchResponse, error) {
	found, box := false, (*agentv1.Sandbox)(nil)
	for _, p := range req.GetPeers() {
		if other := n.peer(p.GetNodeId()); other != nil && other != n && !found {
			found, box = other.offers(req)
		}
	}
	err := n.command("Fetch", req.GetImageDigest()+req.GetCheckpointId(), func() error {
		if req.GetWarm() != nil {
			n.moving.warmed = append(n.moving.warmed, req.GetImageDigest())
		}
		switch {
		case req.GetImageDigest() != "":
			if slices.Contains(n.imageDigests(), req.GetImageDigest()) {
				return nil
			}
			if !found {
				return notHere("image " + req.GetImageDigest())
			}
			if n.moving.images == nil {
				n.moving.images = map[string]bool{BaseDigest: true}
			}
			n.moving.images[req.GetImageDigest()] = true
		case !found:
			return notHere("checkpoint " + req.GetCheckpointId())
		case req.GetReplica():
			if n.moving.replicas == nil {
				n.moving.replicas = make(map[string]*agentv1.Sandbox)
			}
			n.moving.replicas[req.GetCheckpointId()] = box
		default:
			n.saved.put(&agentv1.Checkpoint{Id: req.GetCheckpointId()})
		}
		return nil
	})
	return &agentv1.FetchResponse{}, err
}

func (n *Node) peer(id string) *Node {
	n.mu.Lock()
	agents := n.moving.agents
	n.mu.Unlock()
	if agents == nil {
		return nil
	}
	client, _ := agents.Agent(sandbox.NodeID(id))
	other, _ := client.(*Node) // nil where it is not connected
	return other
}

// offers returns whether the node has something for another, with the sandbox where it is what one is paused in.
func (n *Node) offers(req *agentv1.FetchRequest) (bool, *agentv1.Sandbox) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if d := req.GetImageDigest(); d != "" {
		return slices.Contains(n.imageDigests(), d), nil
	}
	id := req.GetCheckpointId()
	if n.saved.checkpoints[id] != nil {
		return true, nil
	}
	for _, b := range n.boxes {
		if b.GetCheckpointId() == id {
			return true, copyOf(b)
		}
	}
	if b := n.moving.replicas[id]; b != nil {
		return true, copyOf(b)
	}
	return false, nil
}

// Store implements agent.v1.
func (n *Node) Store(_ context.Context, req *agentv1.StoreRequest) (*agentv1.StoreResponse, error) {
	return &agentv1.StoreResponse{}, n.command("Store", req.GetCheckpointId(), func() error {
		for _, b := range n.boxes {
			if b.GetCheckpointId() == req.GetCheckpointId() {
				n.moving.agents.store(req.GetCheckpointId(), copyOf(b))
			}
		}
		return nil
	})
}

// Guard implements agent.v1.
func (n *Node) Guard(_ context.Context, req *agentv1.GuardRequest) (*agentv1.GuardResponse, error) {
	return &agentv1.GuardResponse{}, n.command("Guard", req.GetId(), func() error {
		b, err := n.find(req.GetId())
		if err != nil {
			return err
		}
		if b.GetGeneration() != req.GetGeneration() || b.GetState() != agentv1.State_STATE_PAUSED {
			return refused("sandbox %s is %s, of generation %d", b.GetId(), b.GetState(), b.GetGeneration())
		}
		n.guard(b.GetId(), req.GetGuarded())
		return nil
	})
}

// guard requires mu.
func (n *Node) guard(id string, guarded bool) {
	if n.moving.guarded == nil {
		n.moving.guarded = make(map[string]bool)
	}
	n.moving.guarded[id] = guarded
}

// Guarded reports whether the node was told that a sandbox may be brought back elsewhere.
func (n *Node) Guarded(id sandbox.ID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.moving.guarded[string(id)]
}

// Depart implements agent.v1.
func (n *Node) Depart(ctx context.Context, req *agentv1.DepartRequest) (*agentv1.DepartResponse, error) {
	var parcel *agentv1.Parcel
	err := n.command("Depart", req.GetId(), func() error {
		b, err := n.find(req.GetId())
		if err != nil {
			return err
		}
		ran := b.GetState() == agentv1.State_STATE_RUNNING
		if !ran && b.GetState() != agentv1.State_STATE_PAUSED {
			return refused("sandbox %s is %s", b.GetId(), b.GetState())
		}
		if n.moving.running == nil {
			n.moving.running = make(map[string]bool)
		}
		n.moving.running[b.GetId()] = ran
		if ran {
			n.allocated = n.allocated.Sub(amount(b))
			b.PausedAt, b.CheckpointId = timestamppb.Now(), checkpointOf(b)
		}
		n.turn(b, agentv1.State_STATE_MIGRATING, "departed")
		parcel = &agentv1.Parcel{Sandbox: copyOf(b), ImageDigest: b.GetImageDigest(), Running: ran}
		return n.halfway(ctx)
	})
	return &agentv1.DepartResponse{Parcel: parcel, Load: n.Load()}, err
}

func checkpointOf(b *agentv1.Sandbox) string {
	return fmt.Sprintf("pause-%s-%d", b.GetId(), b.GetGeneration())
}

// Return implements agent.v1.
func (n *Node) Return(_ context.Context, req *agentv1.ReturnRequest) (*agentv1.ReturnResponse, error) {
	var box *agentv1.Sandbox
	err := n.command("Return", req.GetId(), func() error {
		b, err := n.find(req.GetId())
		if err != nil {
			return err
		}
		if b.GetState() == agentv1.State_STATE_MIGRATING && !b.GetReceived() {
			b.Generation = max(b.GetGeneration(), req.GetGeneration()-1)
			n.goOn(b, n.moving.running[b.GetId()], "returned")
		}
		box = copyOf(b)
		return nil
	})
	return &agentv1.ReturnResponse{Sandbox: box, Load: n.Load()}, err
}

// goOn requires mu.
func (n *Node) goOn(b *agentv1.Sandbox, run bool, kind string) {
	b.Received = false
	if !run {
		n.turn(b, agentv1.State_STATE_PAUSED, kind)
		return
	}
	n.allocated = n.allocated.Add(amount(b))
	b.PausedAt, b.CheckpointId = nil, ""
	n.turn(b, agentv1.State_STATE_RUNNING, kind)
}

// Receive implements agent.v1.
func (n *Node) Receive(_ context.Context, req *agentv1.ReceiveRequest) (*agentv1.ReceiveResponse, error) {
	var box *agentv1.Sandbox
	about := req.GetCheckpointId()
	if req.GetParcel() != nil {
		about = req.GetParcel().GetSandbox().GetId()
	}
	err := n.command("Receive", about, func() error {
		b := copyOf(req.GetParcel().GetSandbox())
		if req.GetParcel() == nil {
			kept := n.moving.replicas[req.GetCheckpointId()]
			if kept == nil && req.GetBucket() {
				kept = n.moving.agents.stored(req.GetCheckpointId())
			}
			if kept == nil {
				return notHere("replica " + req.GetCheckpointId())
			}
			b = copyOf(kept)
			delete(n.moving.replicas, req.GetCheckpointId())
		}
		if n.Room > 0 && n.runningBoxes() >= n.Room {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("node %s has no room", n.ID))
		}
		if b.GetGeneration() >= req.GetGeneration() {
			return refused("sandbox %s has generation %d already", b.GetId(), b.GetGeneration())
		}
		if n.moving.running == nil {
			n.moving.running = make(map[string]bool)
		}
		n.moving.running[b.GetId()] = req.GetParcel().GetRunning()
		b.NodeId, b.Generation, b.Received, b.State = string(n.ID), req.GetGeneration(), true, agentv1.State_STATE_MIGRATING
		n.boxes[b.GetId()] = b
		n.note(b, "received")
		box = copyOf(b)
		return nil
	})
	return &agentv1.ReceiveResponse{Sandbox: box, Load: n.Load()}, err
}

// Arrive implements agent.v1.
func (n *Node) Arrive(_ context.Context, req *agentv1.ArriveRequest) (*agentv1.ArriveResponse, error) {
	var box *agentv1.Sandbox
	name := "Arrive"
	if req.GetPaused() {
		name = "ArrivePaused"
	}
	err := n.command(name, req.GetId(), func() error {
		b, err := n.find(req.GetId())
		if err != nil {
			return err
		}
		switch {
		case b.GetReceived() && b.GetGeneration() != req.GetGeneration():
			return refused("sandbox %s has generation %d", b.GetId(), b.GetGeneration())
		case b.GetReceived():
			n.goOn(b, n.moving.running[b.GetId()] && !req.GetPaused(), "arrived")
			if n.moving.arrivals == nil {
				n.moving.arrivals = make(map[string]int)
			}
			n.moving.arrivals[b.GetId()]++
		}
		box = copyOf(b)
		return nil
	})
	return &agentv1.ArriveResponse{Sandbox: box, Load: n.Load()}, err
}

// Forget implements agent.v1.
func (n *Node) Forget(_ context.Context, req *agentv1.ForgetRequest) (*agentv1.ForgetResponse, error) {
	err := n.command("Forget", req.GetId()+req.GetReplica(), func() error {
		if req.GetReplica() != "" {
			delete(n.moving.replicas, req.GetReplica())
			return nil
		}
		b := n.boxes[req.GetId()]
		switch {
		case b == nil:
			return nil
		case req.GetBelow() == 0 && b.GetState() == agentv1.State_STATE_MIGRATING:
		case b.GetGeneration() >= req.GetBelow():
			return refused("sandbox %s has generation %d, not below %d", b.GetId(), b.GetGeneration(), req.GetBelow())
		}
		if b.GetReceived() {
			delete(n.boxes, req.GetId()) // it takes nothing yet
		} else {
			n.drop(req.GetId())
		}
		n.note(b, "forgotten")
		return nil
	})
	return &agentv1.ForgetResponse{Load: n.Load()}, err
}

// Reborn gives the node what a copy of before left there: a sandbox that it had, as it was.
func (n *Node) Reborn(b *agentv1.Sandbox) {
	n.mu.Lock()
	defer n.mu.Unlock()
	kept, _ := proto.Clone(b).(*agentv1.Sandbox) // of the same type
	n.boxes[b.GetId()] = kept
	n.note(kept, "adopted")
}

// Box returns what the node has of a sandbox, or nil.
func (n *Node) Box(id sandbox.ID) *agentv1.Sandbox {
	n.mu.Lock()
	defer n.mu.Unlock()
	if b := n.boxes[string(id)]; b != nil {
		return copyOf(b)
	}
	return nil
}

// obtain gets the image of a create that the node lacks from one of its peers. It requires mu.
func (n *Node) obtain(req *agentv1.CreateRequest) error {
	d := req.GetImageDigest()
	if n.moving.images == nil || n.moving.images[d] {
		return nil
	}
	if len(req.GetPeers()) == 0 {
		return notHere("image " + d)
	}
	n.moving.images[d] = true
	return nil
}

// Arrivals counts how often a received sandbox was let go on at the node.
func (n *Node) Arrivals(id sandbox.ID) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.moving.arrivals[string(id)]
}
