package scheduler

import (
	"slices"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Node is what the scheduler needs to know of a machine.
type Node struct {
	ID      sandbox.NodeID
	State   sandbox.NodeState
	Labels  map[string]string
	Engines []string
	// Images holds the content addresses of images and the ids of checkpoints that the node has.
	Images map[string]struct{}
	// Capacity is what the node has, before over-commit.
	Capacity sandbox.Resources
	// Allocated is what its sandboxes may use, those that are being created included.
	Allocated sandbox.Resources
	// Creating counts the sandboxes that are being created; Warm those that stand ready to be claimed.
	Creating int
	Warm     int
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
	// Image must be among the node's images: a node cannot fetch one. Empty accepts any node.
	Image string
	// Labels must all be on the node.
	Labels map[string]string
	// Random picks the sample; nil looks at the nodes in their order.
	Random Source
}

// Strategy says what makes one node better than another.
type Strategy string

// The strategies.
const (
	// Spread prefers the least loaded node.
	Spread Strategy = "spread"
	// Binpack prefers the most loaded node that still has room.
	Binpack Strategy = "binpack"
)

// Valid reports whether s is one of the strategies.
func (s Strategy) Valid() bool { return s == Spread || s == Binpack }

// Policy is how to choose. The zero value means the defaults that each field names.
type Policy struct {
	// Strategy is Spread by default.
	Strategy Strategy
	// Sample is how many fitting nodes are compared: 8 by default.
	Sample int
	// MaxCreating is how many creations a node may have under way: 64 by default.
	MaxCreating int
	// Overcommit multiplies capacities; a part that is 0 counts as 1.
	Overcommit Overcommit
	// Weights of the parts of a score; all zero means DefaultWeights.
	Weights Weights
}

// Overcommit multiplies the parts of a capacity.
type Overcommit struct{ CPU, Memory, Disk float64 }

// Weights says how much each part of a score counts.
type Weights struct {
	// Load is the node's use after the placement, seen as the strategy sees it.
	Load float64
	// Warm is whether the node has a sandbox ready to be claimed.
	Warm float64
	// Creating is how few creations the node has under way.
	Creating float64
}

// DefaultWeights returns the weights that are used where a policy names none: load decides, and a warm sandbox breaks near
// ties.
func DefaultWeights() Weights { return Weights{Load: 1, Warm: 0.25, Creating: 0.25} }

func (p Policy) withDefaults() Policy {
	if p.Strategy == "" {
		p.Strategy = Spread
	}
	if p.Sample <= 0 {
		p.Sample = 8
	}
	if p.MaxCreating <= 0 {
		p.MaxCreating = 64
	}
	if p.Weights == (Weights{}) {
		p.Weights = DefaultWeights()
	}
	return p
}

// limit returns the capacity with over-commit.
func (p Policy) limit(capacity sandbox.Resources) sandbox.Resources {
	return sandbox.Resources{
		MilliCPU:    times(capacity.MilliCPU, p.Overcommit.CPU),
		MemoryBytes: times(capacity.MemoryBytes, p.Overcommit.Memory),
		DiskBytes:   times(capacity.DiskBytes, p.Overcommit.Disk),
	}
}

func times(amount int64, factor float64) int64 {
	if factor <= 0 || factor == 1 {
		return amount
	}
	return int64(float64(amount) * factor)
}

func (n *Node) hasEngine(name string) bool { return name == "" || slices.Contains(n.Engines, name) }

func (n *Node) hasImage(digest string) bool {
	if digest == "" {
		return true
	}
	_, ok := n.Images[digest]
	return ok
}

func (n *Node) hasLabels(want map[string]string) bool {
	for k, v := range want {
		if n.Labels[k] != v {
			return false
		}
	}
	return true
}
