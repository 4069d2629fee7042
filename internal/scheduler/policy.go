package scheduler

import (
	"math"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Strategy says what makes one node better than another.
type Strategy string

// The strategies.
const (
	// Spread prefers the least loaded node.
	Spread Strategy = "spread"
	// Binpack prefers the most loaded node that still has room.
	Binpack Strategy = "binpack"
	// RoundRobin takes the nodes that have room one after the other.
	RoundRobin Strategy = "round_robin"
	// Sticky takes the node that the request's key had last, else the nodes in an order that the key decides.
	Sticky Strategy = "sticky"
)

// Valid reports whether s is one of the strategies.
func (s Strategy) Valid() bool { return s == Spread || s == Binpack || s == RoundRobin || s == Sticky }

// ordered reports whether the order in which nodes are visited is also that of the candidates.
func (s Strategy) ordered() bool { return s == RoundRobin || s == Sticky }

// Selection says how one of the best candidates is chosen as the first.
type Selection string

// The selections.
const (
	// Random gives each the same chance.
	Random Selection = "random"
	// Weighted gives each a chance in proportion to its score.
	Weighted Selection = "weighted"
)

// Policy is how to choose. The zero value of a field means the default that it names.
type Policy struct {
	// Strategy is Spread by default.
	Strategy Strategy `json:"strategy,omitempty"`
	// Sample is how many fitting nodes are compared: 8 by default.
	Sample int `json:"sample,omitempty"`
	// PrioritySelectNum is among how many of the best candidates the first is drawn: 1, the best, by default. It keeps
	// servers that decide on the same data from all choosing the same node. Spread and Binpack only.
	PrioritySelectNum int `json:"priority_select_num,omitempty"`
	// LeastSelectName is how it is drawn: Random by default.
	LeastSelectName Selection `json:"least_select_name,omitempty"`
	// MaxCreating is how many creations a node may have under way: 64 by default.
	MaxCreating int `json:"max_creating,omitempty"`
	// MaxFailures is from how many recent failures on a node is only asked where there is no other: 5 by default.
	MaxFailures float64 `json:"max_failures,omitempty"`
	// FailureHalfLife is after what time a failure counts half: 30 s by default.
	FailureHalfLife time.Duration `json:"failure_half_life,omitempty"`
	// Overcommit multiplies capacities; a part that is 0 counts as 1. The node's own admission is not changed by it.
	Overcommit Overcommit `json:"overcommit,omitzero"`
	// Reserved is what is left free on each node, for sandboxes that resume there.
	Reserved sandbox.Resources `json:"reserved,omitzero"`
	// Weights of the parts of a score; all zero means DefaultWeights.
	Weights Weights `json:"weights,omitzero"`
}

// Overcommit multiplies the parts of a capacity.
type Overcommit struct {
	CPU    float64 `json:"cpu,omitempty"`
	Memory float64 `json:"memory,omitempty"`
	Disk   float64 `json:"disk,omitempty"`
}

// Weights says how much each part of a score counts.
type Weights struct {
	// Load is the node's use after the placement, seen as the strategy sees it.
	Load float64 `json:"load"`
	// Warm is whether the node has a sandbox ready to be claimed.
	Warm float64 `json:"warm"`
	// Creating is how few creations the node has under way.
	Creating float64 `json:"creating"`
	// Sandboxes is how few sandboxes the node has, or how many with Binpack.
	Sandboxes float64 `json:"sandboxes"`
	// UsedCPU and UsedMemory are how little of the machine is really in use, where the node says.
	UsedCPU    float64 `json:"used_cpu"`
	UsedMemory float64 `json:"used_memory"`
	// Image is whether the node has what the sandbox starts from, where it could also fetch it.
	Image float64 `json:"image"`
	// Affinity is what the request prefers, and taints that speak against the node.
	Affinity float64 `json:"affinity"`
}

// DefaultWeights returns the weights that are used where a policy names none: load and what the request prefers decide,
// and a warm sandbox breaks near ties.
func DefaultWeights() Weights {
	return Weights{Load: 1, Warm: 0.25, Creating: 0.25, Sandboxes: 0.1, UsedCPU: 0.25, UsedMemory: 0.25, Image: 0.5, Affinity: 1}
}

func (w Weights) sum() float64 {
	return w.Load + w.Warm + w.Creating + w.Sandboxes + w.UsedCPU + w.UsedMemory + w.Image + w.Affinity
}

// WithDefaults returns the policy with every default filled in.
func (p Policy) WithDefaults() Policy {
	orDefault(&p.Strategy, Spread)
	orDefault(&p.Sample, 8)
	orDefault(&p.PrioritySelectNum, 1)
	orDefault(&p.LeastSelectName, Random)
	orDefault(&p.MaxCreating, 64)
	orDefault(&p.MaxFailures, 5)
	orDefault(&p.FailureHalfLife, 30*time.Second)
	orDefault(&p.Overcommit.CPU, 1)
	orDefault(&p.Overcommit.Memory, 1)
	orDefault(&p.Overcommit.Disk, 1)
	orDefault(&p.Weights, DefaultWeights())
	return p
}

func orDefault[T comparable](at *T, value T) {
	var zero T
	if *at == zero {
		*at = value
	}
}

// The bounds of a policy.
const (
	maxSample     = 256
	maxCreating   = 1_000_000
	maxFactor     = 1000
	maxWeight     = 1000
	maxHalfLife   = time.Hour
	leastFactor   = 0.01
	leastHalfLife = time.Second
)

// Check refuses a policy that cannot be. It takes the defaults for what is missing. Errors: ErrInvalid, which names the
// field, its value and what would be right.
func (p Policy) Check() error {
	p = p.WithDefaults()
	switch {
	case !p.Strategy.Valid():
		return sandbox.Invalidf("strategy %.40q: want %s, %s, %s or %s", p.Strategy, Spread, Binpack, RoundRobin, Sticky)
	case p.Sample < 1 || p.Sample > maxSample:
		return sandbox.Invalidf("sample %d: want 1 to %d", p.Sample, maxSample)
	case p.PrioritySelectNum < 1 || p.PrioritySelectNum > p.Sample:
		return sandbox.Invalidf("priority_select_num %d: want 1 to sample, which is %d", p.PrioritySelectNum, p.Sample)
	case p.LeastSelectName != Random && p.LeastSelectName != Weighted:
		return sandbox.Invalidf("least_select_name %.40q: want %s or %s", p.LeastSelectName, Random, Weighted)
	case p.MaxCreating < 1 || p.MaxCreating > maxCreating:
		return sandbox.Invalidf("max_creating %d: want 1 to %d", p.MaxCreating, maxCreating)
	case !within(p.MaxFailures, 1, maxCreating):
		return sandbox.Invalidf("max_failures %v: want 1 to %d", p.MaxFailures, maxCreating)
	case p.FailureHalfLife < leastHalfLife || p.FailureHalfLife > maxHalfLife:
		return sandbox.Invalidf("failure_half_life %s: want %s to %s", p.FailureHalfLife, leastHalfLife, maxHalfLife)
	case p.Reserved.MilliCPU < 0 || p.Reserved.MemoryBytes < 0 || p.Reserved.DiskBytes < 0:
		return sandbox.Invalidf("reserved %+v: want 0 or more of each", p.Reserved)
	}
	for _, f := range []named{{"cpu", p.Overcommit.CPU}, {"memory", p.Overcommit.Memory}, {"disk", p.Overcommit.Disk}} {
		if !within(f.value, leastFactor, maxFactor) {
			return sandbox.Invalidf("overcommit %s %v: want %v to %d", f.name, f.value, leastFactor, maxFactor)
		}
	}
	for _, w := range p.Weights.all() {
		if !within(w.value, 0, maxWeight) {
			return sandbox.Invalidf("weight %s %v: want 0 to %d", w.name, w.value, maxWeight)
		}
	}
	return nil
}

type named struct {
	name  string
	value float64
}

func (w Weights) all() []named {
	return []named{
		{"load", w.Load},
		{"warm", w.Warm},
		{"creating", w.Creating},
		{"sandboxes", w.Sandboxes},
		{"used_cpu", w.UsedCPU},
		{"used_memory", w.UsedMemory},
		{"image", w.Image},
		{"affinity", w.Affinity},
	}
}

// within is false for what is no number.
func within(v, least, most float64) bool { return !math.IsNaN(v) && v >= least && v <= most }

// rules is a policy with every default filled in.
type rules struct{ Policy }

// limit returns what sandboxes of a node may have in all.
func (p *rules) limit(capacity sandbox.Resources) sandbox.Resources {
	return sandbox.Resources{
		MilliCPU:    times(capacity.MilliCPU, p.Overcommit.CPU),
		MemoryBytes: times(capacity.MemoryBytes, p.Overcommit.Memory),
		DiskBytes:   times(capacity.DiskBytes, p.Overcommit.Disk),
	}.Sub(p.Reserved)
}

func times(amount int64, factor float64) int64 {
	if factor <= 0 || factor == 1 {
		return amount
	}
	if product := float64(amount) * factor; product < math.MaxInt64 {
		return int64(product)
	}
	return math.MaxInt64
}
