package scheduler

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const gib = int64(1) << 30

func machine(id string, used int64) Node {
	return Node{
		ID: sandbox.NodeID(id), State: sandbox.NodeReady, Engines: []string{"gvisor"},
		Images:    map[string]struct{}{"sha256:base": {}},
		Capacity:  sandbox.Resources{MilliCPU: 8000, MemoryBytes: 16 * gib, DiskBytes: 100 * gib},
		Allocated: sandbox.Resources{MilliCPU: used * 1000, MemoryBytes: used * gib, DiskBytes: used * gib},
	}
}

func small() Request {
	return Request{
		Resources: sandbox.Resources{MilliCPU: 1000, MemoryBytes: gib, DiskBytes: gib},
		Engine:    "gvisor", Image: "sha256:base",
	}
}

func selector(text string) Selector {
	s, err := ParseSelector(text)
	if err != nil {
		panic(err)
	}
	return s
}

func TestPlaceOrder(t *testing.T) {
	nodes := []Node{machine("a", 4), machine("b", 0), machine("c", 6), machine("d", 2)}
	tests := []struct {
		name   string
		policy Policy
		change func([]Node)
		want   string
	}{
		{"spread is the default", Policy{}, nil, "[b d a c]"},
		{"binpack", Policy{Strategy: Binpack}, nil, "[c a d b]"},
		{"a node without the image is left out", Policy{}, func(n []Node) { n[1].Images = nil }, "[d a c]"},
		{"warm breaks near ties", Policy{}, func(n []Node) { n[1].Allocated.MilliCPU, n[3].Warm = 1000, 2 }, "[d b a c]"},
		{
			"fewer creations are better",
			Policy{MaxCreating: 10, Weights: Weights{Creating: 1}},
			func(n []Node) { n[0].Creating, n[1].Creating, n[2].Creating = 3, 2, 1 }, "[d c b a]",
		},
		{"a node that is not ready is left out", Policy{}, func(n []Node) { n[1].State = sandbox.NodeSuspect }, "[d a c]"},
		{
			"over-commit makes room",
			Policy{Overcommit: Overcommit{CPU: 2, Memory: 2}},
			func(n []Node) { n[1].Allocated = sandbox.Resources{MilliCPU: 8000, MemoryBytes: 16 * gib} }, "[d a c b]",
		},
		{"the sample bounds the candidates", Policy{Sample: 2}, nil, "[b a]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			copied := slices.Clone(nodes)
			if tt.change != nil {
				tt.change(copied)
			}
			d := Place(Snapshot{Nodes: copied, Policy: tt.policy}, small())
			if got := fmt.Sprint(d.Candidates); got != tt.want {
				t.Errorf("candidates %s, want %s\n%s", got, tt.want, d.Explain(9))
			}
		})
	}
}

func TestPlaceRefusals(t *testing.T) {
	tests := []struct {
		name     string
		node     func(*Node)
		request  func(*Request)
		want     string
		tooLarge bool
	}{
		{"state", func(n *Node) { n.State = sandbox.NodeDraining }, nil, "node a is draining", false},
		{"engine", nil, func(r *Request) { r.Engine = "qemu" }, "node a lacks the engine", false},
		{"label", nil, func(r *Request) { r.Selector = selector("gpu=1") }, "node a does not meet the selector's gpu=1", false},
		{
			"too large", nil, func(r *Request) { r.Resources.MemoryBytes = 17 * gib },
			"node a is too small: wants 17408 MiB of memory, 16384 of 16384 free", true,
		},
		{
			"no room", func(n *Node) { n.Allocated = sandbox.Resources{MilliCPU: 7500, MemoryBytes: 16 * gib} }, nil,
			"node a is full: wants 1000 millicores, 500 of 8000 free, wants 1024 MiB of memory, 0 of 16384 free", false,
		},
		{
			"disk", func(n *Node) { n.Capacity.DiskBytes = 0 }, nil,
			"node a is too small: wants 1024 MiB of disk, 0 of 0 free", true,
		},
		{"image", func(n *Node) { n.Images = nil }, nil, "node a does not have the template", false},
		{"busy", func(n *Node) { n.Creating = 64 }, nil, "node a is busy: 64 sandboxes being created", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n, r := machine("a", 0), small()
			if tt.node != nil {
				tt.node(&n)
			}
			if tt.request != nil {
				tt.request(&r)
			}
			d := Place(Snapshot{Nodes: []Node{n}}, r)
			if len(d.Candidates) != 0 || d.Refused != 1 {
				t.Fatalf("decision %+v", d)
			}
			if diff := gocmp.Diff(tt.want, d.Explain(3)); diff != "" {
				t.Error(diff)
			}
			if d.TooLarge != tt.tooLarge {
				t.Errorf("TooLarge is %v", d.TooLarge)
			}
		})
	}
	if got := Place(Snapshot{}, small()).Explain(3); got != "there is no node" {
		t.Errorf("empty cluster: %q", got)
	}
}

func TestExplainIsBounded(t *testing.T) {
	var nodes []Node
	for i := range 200 {
		n := machine(fmt.Sprint("n", i), 0)
		n.State = sandbox.NodeDown
		nodes = append(nodes, n)
	}
	d := Place(Snapshot{Nodes: nodes}, small())
	if d.Refused != 200 || len(d.Verdicts) != keptRefusals {
		t.Errorf("refused %d, kept %d", d.Refused, len(d.Verdicts))
	}
	if got := d.Explain(2); got != "node n0 is down; node n1 is down; and 198 more" {
		t.Error(got)
	}
}

// randomCluster draws nodes that differ in everything that Place looks at.
func randomCluster(r *rand.Rand) Snapshot {
	states := []sandbox.NodeState{sandbox.NodeReady, sandbox.NodeReady, sandbox.NodeReady, sandbox.NodeDown, sandbox.NodeCordoned}
	nodes := make([]Node, r.IntN(40))
	for i := range nodes {
		n := machine(fmt.Sprint("n", i), int64(r.IntN(9)))
		n.State = states[r.IntN(len(states))]
		n.Creating, n.Warm = r.IntN(5), r.IntN(3)
		if r.IntN(3) == 0 {
			n.Images = nil
		}
		if r.IntN(5) == 0 {
			n.Engines = nil
		}
		nodes[i] = n
	}
	strategy := []Strategy{Spread, Binpack}[r.IntN(2)]
	return Snapshot{Nodes: nodes, Policy: Policy{Strategy: strategy, Sample: 1 + r.IntN(10), MaxCreating: 4}}
}

func TestPlaceProperties(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		s, want := randomCluster(r), small()
		want.Resources.MilliCPU = int64(1 + r.IntN(9000))
		want.Random = rand.NewPCG(seed, 2)
		d := Place(s, want)

		fitting := 0
		byID := map[sandbox.NodeID]*Node{}
		for i := range s.Nodes {
			n := &s.Nodes[i]
			byID[n.ID] = n
			if (&rules{s.Policy.WithDefaults()}).fits(n, want) {
				fitting++
			}
		}
		if got := len(d.Candidates); got != min(fitting, s.Policy.Sample) {
			t.Fatalf("seed %d: %d candidates of %d fitting nodes with a sample of %d", seed, got, fitting, s.Policy.Sample)
		}
		seen := map[sandbox.NodeID]bool{}
		for _, id := range d.Candidates {
			if seen[id] {
				t.Fatalf("seed %d: %s appears twice", seed, id)
			}
			seen[id] = true
			if !(&rules{s.Policy.WithDefaults()}).fits(byID[id], want) {
				t.Fatalf("seed %d: %s does not fit", seed, id)
			}
		}
		scores := d.Verdicts[:len(d.Candidates)]
		if !slices.IsSortedFunc(scores, func(a, b Verdict) int { return cmp.Compare(b.Score, a.Score) }) {
			t.Fatalf("seed %d: candidates out of order: %s", seed, d.Explain(40))
		}
		for _, v := range scores {
			if v.Score < 0 || v.Score > 1 {
				t.Fatalf("seed %d: score %v", seed, v)
			}
		}
		if d.Refused > len(s.Nodes)-fitting {
			t.Fatalf("seed %d: %d refused of %d", seed, d.Refused, len(s.Nodes)-fitting)
		}
		want.Random = rand.NewPCG(seed, 2)
		if diff := gocmp.Diff(d, Place(s, want)); diff != "" {
			t.Fatalf("seed %d: the same input gave another decision: %s", seed, diff)
		}
	}
}

// fits states the filters a second time, in the plainest way.
func (p *rules) fits(n *Node, r Request) bool {
	free := n.Capacity.Sub(n.Allocated)
	return n.State == sandbox.NodeReady && slices.Contains(n.Engines, r.Engine) && n.Creating < p.MaxCreating && n.hasImage(r.Image) &&
		r.Resources.MilliCPU <= free.MilliCPU && r.Resources.MemoryBytes <= free.MemoryBytes &&
		r.Resources.DiskBytes <= free.DiskBytes
}

// A node that has room must be found wherever it stands, and equal nodes must be chosen about equally often.
func TestSampleIsFair(t *testing.T) {
	const nodes, rounds = 24, 24_000
	var s Snapshot
	s.Policy.Sample = 2
	for i := range nodes {
		s.Nodes = append(s.Nodes, machine(strconv.Itoa(i), 0))
	}
	random := rand.NewPCG(7, 7)
	first := map[sandbox.NodeID]int{}
	for range rounds {
		r := small()
		r.Random = random
		first[Place(s, r).Candidates[0]]++
	}
	for id, n := range first {
		if n < rounds/nodes*8/10 || n > rounds/nodes*12/10 {
			t.Errorf("node %s was first %d times of about %d", id, n, rounds/nodes)
		}
	}
	if len(first) != nodes {
		t.Errorf("%d nodes were first", len(first))
	}
}

// Placing until nothing fits must fill the cluster to the last sandbox: nothing is refused while a node has room.
func TestPlaceFillsTheCluster(t *testing.T) {
	for _, strategy := range []Strategy{Spread, Binpack} {
		var s Snapshot
		s.Policy.Strategy = strategy
		for i := range 10 {
			s.Nodes = append(s.Nodes, machine(strconv.Itoa(i), 0))
		}
		r := small()
		r.Random = rand.NewPCG(1, 1)
		placed, spread := 0, 0
		for {
			d := Place(s, r)
			if len(d.Candidates) == 0 {
				break
			}
			i := slices.IndexFunc(s.Nodes, func(n Node) bool { return n.ID == d.Candidates[0] })
			s.Nodes[i].Allocated = s.Nodes[i].Allocated.Add(r.Resources)
			if placed++; placed == 10 {
				for _, n := range s.Nodes {
					if n.Allocated.MilliCPU > 0 {
						spread++
					}
				}
			}
		}
		if placed != 80 {
			t.Errorf("%s placed %d of 80", strategy, placed)
		}
		if strategy == Spread && spread < 6 || strategy == Binpack && spread > 4 {
			t.Errorf("%s used %d nodes for the first 10", strategy, spread)
		}
	}
}

func TestStrategyValid(t *testing.T) {
	if !Spread.Valid() || !Binpack.Valid() || Strategy("fast").Valid() || !strings.EqualFold("spread", string(Spread)) {
		t.Error("wrong strategies")
	}
}

func BenchmarkPlace(b *testing.B) {
	for _, nodes := range []int{1, 10, 100, 1000, 10_000} {
		for _, full := range []bool{false, true} {
			var s Snapshot
			for i := range nodes {
				used := int64(i % 8)
				if full {
					used = 8
				}
				s.Nodes = append(s.Nodes, machine(strconv.Itoa(i), used))
			}
			r := small()
			r.Random = rand.NewPCG(1, 1)
			b.Run(fmt.Sprintf("nodes=%d/full=%v", nodes, full), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					Place(s, r)
				}
			})
		}
	}
}
