package chaos

import (
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

// What has a fault gets no second one, every fault ends within its round, and a minute has nearly every kind.
func TestPlanIsSound(t *testing.T) {
	kinds := map[Kind]int{}
	for seed := range uint64(200) {
		for _, r := range Make(seed, Setup{Total: time.Minute, Nodes: 3, Slots: 4}) {
			for i, f := range r.Faults {
				kinds[f.Kind]++
				if f.At < 0 || f.For <= 0 || f.At+f.For > ActiveTime {
					t.Errorf("seed %d: %+v does not end in its round", seed, f)
				}
				if f.Kind == Drain {
					continue
				}
				for _, g := range r.Faults[i+1:] {
					if g.Kind != Drain && g.At < f.At+f.For && touch(f, g) {
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
	for _, k := range []Kind{Kill, Power, Halt, Freeze, Isolate, Cut, Deaf, Fill, Drain} {
		if kinds[k] < 150 {
			t.Errorf("%d times %s in 200 minutes", kinds[k], k)
		}
	}
	if kinds[Clock] > 0 {
		t.Error("the clock is set without being asked for")
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
