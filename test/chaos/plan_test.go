package chaos

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPlanIsRepeated(t *testing.T) {
	s := Setup{Total: 10 * time.Minute, Nodes: 3, Slots: 8, Clock: true}
	one := Make(7, s)
	if diff := cmp.Diff(one, Make(7, s)); diff != "" {
		t.Errorf("the same seed gives another plan:\n%s", diff)
	}
	if cmp.Equal(one, Make(8, s)) {
		t.Error("another seed gives the same plan")
	}
	if len(one) != 30 {
		t.Errorf("%d rounds in %s", len(one), s.Total)
	}
}

// What has a fault gets no second one beside a drain and a clock, every fault ends within its round, and a minute has nearly
// every kind.
func TestPlanIsSound(t *testing.T) {
	kinds := map[Kind]int{}
	for seed := range uint64(200) {
		for _, r := range Make(seed, Setup{Total: time.Minute, Nodes: 3, Slots: 4, Clock: true}) {
			for i, f := range r.Faults {
				kinds[f.Kind]++
				if f.At < 0 || f.For <= 0 || f.At+f.For > ActiveTime {
					t.Errorf("seed %d: %+v does not end in its round", seed, f)
				}
				if f.Kind == Clock && (f.Step.Abs() < 5*time.Second || f.Step.Abs() > 6*time.Hour) {
					t.Errorf("seed %d: %+v", seed, f)
				}
				if f.Kind == Drain {
					continue
				}
				for _, g := range r.Faults[i+1:] {
					if g.Kind != Drain && (f.Kind == Clock) == (g.Kind == Clock) && g.At < f.At+f.For && touch(f, g) {
						t.Errorf("seed %d: %+v and %+v at once", seed, f, g)
					}
				}
			}
			for _, ops := range r.Load {
				for i := range ops[1:] {
					if ops[i+1].At < ops[i].At {
						t.Errorf("seed %d: %+v after %+v", seed, ops[i], ops[i+1])
					}
				}
			}
		}
	}
	for _, k := range []Kind{Kill, Power, Halt, Freeze, Isolate, Cut, Deaf, Fill, Drain, Clock} {
		if kinds[k] < 150 {
			t.Errorf("%d times %s in 200 minutes", kinds[k], k)
		}
	}
}

// Where clocks cannot be set the rest of the plan is the same.
func TestPlanWithoutClocks(t *testing.T) {
	s := Setup{Total: time.Minute, Nodes: 3, Slots: 12, Clock: true}
	with := Make(3, s)
	s.Clock = false
	for i, r := range with {
		with[i].Faults = slices.DeleteFunc(r.Faults, func(f Fault) bool { return f.Kind == Clock })
	}
	if diff := cmp.Diff(Make(3, s), with); diff != "" {
		t.Errorf("another plan without clocks:\n%s", diff)
	}
}

// The run that test/script/test-all makes has every fault at every kind of machine.
func TestPlanOfCI(t *testing.T) {
	const seed = 5
	role := func(name string) string { return strings.TrimRight(name, "0123456789") }
	have := map[card]bool{}
	for _, r := range Make(seed, Setup{Total: time.Minute, Nodes: 3, Slots: 12, Clock: true}) {
		for _, f := range r.Faults {
			have[card{f.Kind, role(f.Target), role(f.Peer)}] = true
		}
	}
	all := append(deck(), card{Drain, "node", ""}, card{Clock, "node", ""}, card{Clock, "server", ""}, card{Clock, "proxy", ""})
	for _, c := range all {
		if !have[c] {
			t.Errorf("no %+v in a minute of seed %d", c, seed)
		}
	}
}

func touch(f, g Fault) bool {
	for _, a := range []string{f.Target, f.Peer} {
		for _, b := range []string{g.Target, g.Peer} {
			if a == b && a != "" {
				return true
			}
		}
	}
	return false
}
