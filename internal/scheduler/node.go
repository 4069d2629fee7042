package scheduler

import (
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Node is what the scheduler needs to know of a machine.
type Node struct {
	ID    sandbox.NodeID
	State sandbox.NodeState
	// Cordoned means that the administrator wants no new sandboxes there.
	Cordoned bool
	Labels   map[string]string
	Taints   []sandbox.Taint
	Engines  []string
	// Machine is what a checkpoint must fit.
	Machine *sandbox.Origin
	// Images holds the content addresses of images and the ids of checkpoints that the node has.
	Images map[string]struct{}
	// Capacity is what the node has, before over-commit.
	Capacity sandbox.Resources
	// Allocated is what its sandboxes may use, those that are being created included.
	Allocated sandbox.Resources
	// Sandboxes counts what it runs, Creating what is being created, Warm what stands ready to be claimed.
	Sandboxes int
	Creating  int
	Warm      int
	// UsedCPU and UsedMemory are how much of the machine is in use, 0 to 1; 0 where that is not known.
	UsedCPU    float64
	UsedMemory float64
	// Failures is what went wrong there lately.
	Failures Failures
}

// Snapshot is the cluster at one moment. Place only reads it.
type Snapshot struct {
	Nodes  []Node
	Policy Policy
}

// Source is where a sample's randomness comes from; *rand.PCG of math/rand/v2 is one.
type Source interface{ Uint64() uint64 }

// Request is what is to be placed.
type Request struct {
	Resources sandbox.Resources
	// Engine must be one of the node's engines; empty accepts any.
	Engine string
	// Image must be among the node's images, unless the node can fetch it. Empty accepts any node.
	Image string
	// Fetch means that a node that lacks the image can fetch it.
	Fetch bool
	// MadeOn is where what the sandbox starts from was saved; nil accepts any machine.
	MadeOn *sandbox.Origin
	// Selector must be met by the node's labels.
	Selector Selector
	// Preferences make nodes better or worse.
	Preferences []Preference
	Tolerations []Toleration
	// Key is what Sticky keeps together.
	Key string
	// Previous is where in Snapshot.Nodes the key's last node stands, plus one; 0 means that it had none.
	Previous int
	// Start is where RoundRobin goes on: the Next of the decision before.
	Start int
	// Now is when the decision is made, by which failures have decayed.
	Now time.Time
	// Random picks the sample; nil looks at the nodes in their order.
	Random Source
}

func (n *Node) hasEngine(name string) bool { return name == "" || slices.Contains(n.Engines, name) }

func (n *Node) hasImage(digest string) bool {
	if digest == "" {
		return true
	}
	_, ok := n.Images[digest]
	return ok
}
