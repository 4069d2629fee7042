package control_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

func threeNodes(t *testing.T, policy scheduler.Policy) *apitest.Cluster {
	t.Helper()
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Policy = policy })
	c.Join(t, apitest.NewNode("bbbbbb"))
	c.Join(t, apitest.NewNode("cccccc"))
	return c
}

func TestRoundRobin(t *testing.T) {
	c := threeNodes(t, scheduler.Policy{Strategy: scheduler.RoundRobin})
	var got []string
	for range 6 {
		got = append(got, string(mustCreate(t, c, minute()).NodeID[:1]))
	}
	if text := strings.Join(got, ""); text != "abcabc" {
		t.Errorf("went to %s", text)
	}
}

func TestSticky(t *testing.T) {
	c := threeNodes(t, scheduler.Policy{Strategy: scheduler.Sticky})
	homes := map[sandbox.NodeID]bool{}
	for key := range 20 {
		req := minute()
		req.Metadata = map[string]string{control.KeySticky: fmt.Sprint("project-", key)}
		first := mustCreate(t, c, req).NodeID
		homes[first] = true
		for range 3 {
			if at := mustCreate(t, c, req).NodeID; at != first {
				t.Errorf("key %d went to %s, then to %s", key, first, at)
			}
		}
	}
	if len(homes) != 3 {
		t.Errorf("20 keys went to %d nodes", len(homes))
	}
}

func TestStickyFollowsThePreviousNode(t *testing.T) {
	c := threeNodes(t, scheduler.Policy{Strategy: scheduler.Sticky})
	first := mustCreate(t, c, minute()).NodeID // the key is the template
	yes, no := true, false
	if _, err := c.Control.UpdateNode(t.Context(), string(first), control.NodeChange{Cordoned: &yes}); err != nil {
		t.Fatal(err)
	}
	second := mustCreate(t, c, minute()).NodeID
	if _, err := c.Control.UpdateNode(t.Context(), string(first), control.NodeChange{Cordoned: &no}); err != nil {
		t.Fatal(err)
	}
	if third := mustCreate(t, c, minute()).NodeID; second == first || third != second {
		t.Errorf("went to %s, %s, %s", first, second, third)
	}
}

func TestPolicySources(t *testing.T) {
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Policy = scheduler.Policy{Strategy: scheduler.Binpack} })
	check := func(step string, strategy scheduler.Strategy, source string) {
		t.Helper()
		if p, from := c.Control.SchedulerPolicy(); p.Strategy != strategy || from != source {
			t.Errorf("%s: %s from %s, want %s from %s", step, p.Strategy, from, strategy, source)
		}
	}
	reload := func(p scheduler.Policy) (bool, error) { return c.Control.ReloadSchedulerPolicy(t.Context(), p) }
	check("start", scheduler.Binpack, control.PolicyFromSettings)
	if inForce, err := reload(scheduler.Policy{Strategy: scheduler.RoundRobin}); err != nil || !inForce {
		t.Error(inForce, err)
	}
	check("reload", scheduler.RoundRobin, control.PolicyFromSettings)
	if _, err := reload(scheduler.Policy{Strategy: "fast"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
	if err := c.Control.SetSchedulerPolicy(t.Context(), scheduler.Policy{Sample: -1}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
	check("bad ones", scheduler.RoundRobin, control.PolicyFromSettings)
	want := scheduler.Policy{Strategy: scheduler.Sticky, FailureHalfLife: time.Minute}
	if err := c.Control.SetSchedulerPolicy(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if inForce, err := reload(scheduler.Policy{Strategy: scheduler.Spread}); err != nil || inForce {
		t.Error(inForce, err)
	}
	check("set", scheduler.Sticky, control.PolicyFromAPI)
	c.Restart(t, func(cfg *control.Config) { cfg.Policy = scheduler.Policy{Strategy: scheduler.Binpack} })
	check("restart", scheduler.Sticky, control.PolicyFromAPI)
	if p, _ := c.Control.SchedulerPolicy(); p != want.WithDefaults() {
		t.Errorf("restart: %+v", p)
	}
	if err := c.Control.ResetSchedulerPolicy(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("reset", scheduler.Binpack, control.PolicyFromSettings)
}

func TestExplainSchedule(t *testing.T) {
	c := threeNodes(t, scheduler.Policy{})
	yes := true
	if _, err := c.Control.UpdateNode(t.Context(), "bbbbbb", control.NodeChange{Cordoned: &yes}); err != nil {
		t.Fatal(err)
	}
	before := len(c.Node.Created())
	s, err := c.Control.ExplainSchedule(t.Context(), control.ScheduleQuery{Resources: sandbox.Resources{MilliCPU: 1000}})
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Nodes) != 3 || s.Template != "base" || s.Resources.MilliCPU != 1000 || s.Nodes[2].Name != "node-bbbbbb" || s.Nodes[2].Refusal != scheduler.Cordoned {
		t.Errorf("%+v", s)
	}
	if each := s.Nodes[0].Fits(); each < 1 || s.Fits != each+s.Nodes[1].Fits() {
		t.Errorf("%d fit one node, %d in all", each, s.Fits)
	}
	if len(c.Node.Created()) != before {
		t.Error("explaining created a sandbox")
	}
	for _, q := range []control.ScheduleQuery{
		{Template: "a b"}, {Metadata: map[string]string{control.KeyNodeSelector: "a b"}}, {Resources: sandbox.Resources{MemoryBytes: 1}},
	} {
		if _, err := c.Control.ExplainSchedule(t.Context(), q); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

// TestCheckpointsFitTheirNodes checks that what was saved by one version of the engine, or on one processor, is not given to a node
// with another: not by a create, which says why, nor by a move, nor as a replica.
func TestCheckpointsFitTheirNodes(t *testing.T) {
	for name, tt := range map[string]struct {
		version  string
		features []string
		why      string
	}{
		"engine":    {"v2", []string{"avx", "sse2"}, "its gvisor is v2, the checkpoint was made by v1"},
		"processor": {"v1", []string{"sse2"}, "its processor lacks avx"},
		"fits":      {"v1", []string{"avx", "avx2", "sse2"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := apitest.NewCluster(t, nil)
				c.Node.EngineVersion, c.Node.CPUFeatures = "v1", []string{"sse2", "avx"}
				c.Join(t, c.Node)
				box := mustCreate(t, c, minute())
				snap, err := c.Control.CreateSnapshot(t.Context(), box.ID, control.SnapshotRequest{Name: "saved"})
				if err != nil {
					t.Fatal(err)
				}
				other := apitest.NewNode("bbbbbb")
				other.EngineVersion, other.CPUFeatures = tt.version, tt.features
				c.Join(t, other)
				running(t, c)
				s, err := c.Control.ExplainSchedule(t.Context(), control.ScheduleQuery{Template: snap.ID()})
				if err != nil || len(s.Nodes) != 2 {
					t.Fatalf("%+v, %v", s, err)
				}
				for _, n := range s.Nodes {
					if n.Node == "bbbbbb" && (n.Accepted() != (tt.why == "") || tt.why != "" && !strings.Contains(n.Reason(), tt.why)) {
						t.Errorf("the other node %s", n.Reason())
					}
				}
				mustPause(t, c, box.ID)
				passWith(t, c, 3*time.Second, c.Node, other)
				if got := len(other.Replicas()); (got > 0) != (tt.why == "") {
					t.Errorf("it keeps %d replicas", got)
				}
				if _, err := c.Control.DrainNode(t.Context(), "aaaaaa", control.DrainRequest{}); err != nil {
					t.Fatal(err)
				}
				passWith(t, c, 3*time.Second, c.Node, other)
				n := nodeOf(t, c, "aaaaaa")
				if moved := n.Drain.Moved == 1; moved != (tt.why == "") {
					t.Errorf("%+v", n.Drain)
				}
				if tt.why != "" && (len(n.Drain.Failed) != 1 || !strings.Contains(n.Drain.Failed[0].Reason, tt.why)) {
					t.Errorf("%+v", n.Drain.Failed)
				}
			})
		})
	}
}
