package scheduler

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func four() []Node {
	return []Node{machine("a", 4), machine("b", 0), machine("c", 6), machine("d", 2)}
}

func candidates(d Decision) string { return fmt.Sprint(d.Candidates) }

func TestFilters(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Node)
		want   string
	}{
		{"cordoned", func(n *Node) { n.Cordoned = true }, "node a is cordoned"},
		{
			"taint", func(n *Node) { n.Taints = []sandbox.Taint{{Key: "gpu", Value: "only", Effect: sandbox.NoSchedule}} },
			"node a has the taint gpu=only:NoSchedule, which is not tolerated",
		},
	}
	for _, tt := range tests {
		n := machine("a", 0)
		tt.change(&n)
		if d := Place(Snapshot{Nodes: []Node{n}}, small()); len(d.Candidates) != 0 || d.Explain(3) != tt.want {
			t.Errorf("%s: %s", tt.name, d.Explain(3))
		}
	}
	reserved := Policy{Reserved: sandbox.Resources{MemoryBytes: 16 * gib}}
	if d := Place(Snapshot{Nodes: []Node{machine("a", 0)}, Policy: reserved}, small()); len(d.Candidates) != 0 || !d.TooLarge {
		t.Errorf("what is reserved was given away: %s", d.Explain(3))
	}
}

func TestSoftWishes(t *testing.T) {
	nodes := four()
	nodes[1].Taints = []sandbox.Taint{{Key: "old", Effect: sandbox.PreferNoSchedule}}
	nodes[2].Labels = map[string]string{"zone": "eu"}
	r := small()
	wishful := Policy{Weights: Weights{Load: 0.2, Affinity: 1}}
	if got := candidates(Place(Snapshot{Nodes: nodes, Policy: wishful}, r)); got != "[d a c b]" {
		t.Errorf("a taint that only prefers: %s", got)
	}
	r.Preferences, _ = ParsePreferences("zone=eu*100")
	if got := candidates(Place(Snapshot{Nodes: nodes, Policy: wishful}, r)); got != "[c d a b]" {
		t.Errorf("affinity: %s", got)
	}
	nodes[2].Images = nil
	r.Fetch = true
	if got := candidates(Place(Snapshot{Nodes: nodes, Policy: Policy{Weights: Weights{Image: 1, Load: 0.1}}}, r)); !strings.HasSuffix(got, " c]") {
		t.Errorf("locality: %s", got)
	}
}

func TestRoundRobin(t *testing.T) {
	s := Snapshot{Nodes: four(), Policy: Policy{Strategy: RoundRobin}}
	s.Nodes[2].Cordoned = true
	r := small()
	var got []string
	for range 6 {
		d := Place(s, r)
		got, r.Start = append(got, string(d.Candidates[0])), d.Next
	}
	if text := strings.Join(got, ""); text != "abdabd" {
		t.Errorf("went to %s", text)
	}
}

func TestSticky(t *testing.T) {
	s := Snapshot{Nodes: four(), Policy: Policy{Strategy: Sticky}}
	r := small()
	r.Key = "project"
	r.Random = rand.NewPCG(1, 1)
	first := candidates(Place(s, r))
	if again := candidates(Place(s, r)); again != first {
		t.Errorf("one key has %s, then %s", first, again)
	}
	r.Previous = 3
	if got := candidates(Place(s, r)); !strings.HasPrefix(got, "[c ") || len(got) != len(first) {
		t.Errorf("the previous node was c: %s", got)
	}
	s.Nodes[2].Cordoned = true
	if got := candidates(Place(s, r)); strings.Contains(got, "c") {
		t.Errorf("c is cordoned: %s", got)
	}
}

func TestPrioritySelect(t *testing.T) {
	for _, how := range []Selection{Random, Weighted} {
		s := Snapshot{Nodes: four(), Policy: Policy{PrioritySelectNum: 2, LeastSelectName: how, Weights: Weights{Load: 1}}}
		s.Nodes[3].Allocated.MilliCPU = 7000 // d scores 0, b nearly 1
		s.Nodes[0].Cordoned, s.Nodes[2].Cordoned = true, true
		r := small()
		r.Random = rand.NewPCG(1, 1)
		first := map[sandbox.NodeID]int{}
		for range 1000 {
			d := Place(s, r)
			if len(d.Candidates) != 2 {
				t.Fatal(candidates(d))
			}
			first[d.Candidates[0]]++
		}
		if b := first["b"]; how == Random && (b < 400 || b > 600) || how == Weighted && b != 1000 {
			t.Errorf("%s chose %v", how, first)
		}
	}
}

func TestBrokenNodesAreLast(t *testing.T) {
	s, r := Snapshot{Nodes: four()}, small()
	r.Now = time.Unix(1000, 0)
	s.Nodes[1].Failures = Failures{Count: 8, At: r.Now}
	if got := candidates(Place(s, r)); got != "[d a c]" {
		t.Errorf("b failed: %s", got)
	}
	r.Now = r.Now.Add(30 * time.Second)
	if got := candidates(Place(s, r)); got != "[b d a c]" {
		t.Errorf("b is forgiven: %s", got)
	}
	for i := range s.Nodes {
		s.Nodes[i].Failures = Failures{Count: 100, At: r.Now}
	}
	d := Place(s, r)
	if got := candidates(d); got != "[b d a c]" || d.Refused != 0 || !strings.Contains(d.Explain(1), "there is no other") {
		t.Errorf("all failed: %s, %s", got, d.Explain(4))
	}
}

func TestFailuresDecay(t *testing.T) {
	now := time.Unix(0, 0)
	var f Failures
	for range 4 {
		f = f.Failed(now, time.Minute)
	}
	later := now.Add(2 * time.Minute)
	if f.Now(now, time.Minute) != 4 || f.Now(later, time.Minute) != 1 || f.Succeeded(now, time.Minute).Count != 2 {
		t.Errorf("%+v", f)
	}
	if got := f.Succeeded(now.Add(time.Hour), time.Minute); got != (Failures{}) {
		t.Errorf("an old failure is kept: %+v", got)
	}
}

func TestExplainJudgesAll(t *testing.T) {
	s := Snapshot{Nodes: four(), Policy: Policy{Sample: 1, PrioritySelectNum: 1}}
	s.Nodes[0].Cordoned = true
	d := Explain(s, small())
	if got := candidates(d); got != "[b d c]" || len(d.Verdicts) != 4 || d.Verdicts[0].Fits() != 8 || d.Verdicts[3].Reason() != "is cordoned" {
		t.Errorf("%s, %s", got, d.Explain(9))
	}
}

func TestPolicyCheck(t *testing.T) {
	if err := (Policy{}).Check(); err != nil {
		t.Error(err)
	}
	bad := map[string]Policy{
		"strategy":            {Strategy: "fast"},
		"sample":              {Sample: -1},
		"priority_select_num": {PrioritySelectNum: 9},
		"least_select_name":   {LeastSelectName: "best"},
		"max_creating":        {MaxCreating: -1},
		"max_failures":        {MaxFailures: 0.5},
		"failure_half_life":   {FailureHalfLife: time.Millisecond},
		"reserved":            {Reserved: sandbox.Resources{DiskBytes: -1}},
		"overcommit disk":     {Overcommit: Overcommit{Disk: 1e9}},
		"weight warm":         {Weights: Weights{Warm: -1}},
	}
	for want, p := range bad {
		if err := p.Check(); !errors.Is(err, sandbox.ErrInvalid) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%+v: %v", p, err)
		}
	}
}

// Any policy that passes the check places, with scores of 0 to 1 and nothing on a node without room.
func FuzzPolicy(f *testing.F) {
	f.Add(`{"strategy":"binpack","sample":3,"weights":{"load":1}}`, uint64(1))
	f.Add(`{"strategy":"sticky","overcommit":{"cpu":0.01},"reserved":{"milli_cpu":1}}`, uint64(2))
	f.Add(`{"priority_select_num":4,"least_select_name":"weighted","max_failures":1}`, uint64(3))
	f.Fuzz(func(t *testing.T, text string, seed uint64) {
		var p Policy
		if json.Unmarshal([]byte(text), &p) != nil || p.Check() != nil {
			return
		}
		s := randomCluster(rand.New(rand.NewPCG(seed, 1)))
		s.Policy = p
		r := small()
		r.Random, r.Key, r.Previous, r.Start = rand.NewPCG(seed, 2), text, int(seed%50), int(seed%100)
		d := Place(s, r)
		for _, v := range d.Verdicts[:len(d.Candidates)] {
			if v.Score < 0 || v.Score > 1.000001 || !r.Resources.Fits(v.Free) {
				t.Fatalf("%s", v)
			}
		}
	})
}
