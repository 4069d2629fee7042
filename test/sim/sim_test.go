package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/scheduler"
)

const (
	manyNodes   = 10_000
	manyBoxes   = 1_000_000
	perSecond   = 20_000 // placements of all servers between two reports of the nodes
	manyServers = 5
)

// fill places boxes sandboxes, with the servers told of the truth after each perSecond of them.
func fill(tb testing.TB, c *Cluster, boxes int) {
	tb.Helper()
	for i := range boxes {
		if i%perSecond == 0 {
			c.Tell()
		}
		if !c.Place() {
			tb.Fatalf("sandbox %d of %d was not placed", i, boxes)
		}
	}
}

// Five servers that decide at once on data that is up to a second old fill a large cluster evenly.
func TestSpreadOnOldData(t *testing.T) {
	for _, strategy := range []scheduler.Strategy{scheduler.Spread, scheduler.RoundRobin} {
		t.Run(string(strategy), func(t *testing.T) {
			const nodes, boxes = manyNodes / 10, manyBoxes / 10
			c := New(nodes, 200, manyServers, scheduler.Policy{Strategy: strategy})
			for i := range boxes {
				if i%(perSecond/10) == 0 {
					c.Tell()
				}
				if !c.Place() {
					t.Fatalf("sandbox %d was not placed", i)
				}
			}
			checkSpread(t, c, boxes)
		})
	}
}

func checkSpread(tb testing.TB, c *Cluster, boxes int) {
	tb.Helper()
	fewest, most, all := c.Spread()
	ideal := boxes / len(c.nodes)
	if all != boxes || most*10 > ideal*11 || fewest*10 < ideal*9 {
		tb.Errorf("%d sandboxes, %d to %d per node: want %d within 10 %%", all, fewest, most, ideal)
	}
}

// A cluster is filled to its last place, by servers that know little, and no node takes more than it has.
func TestCapacityIsNeverExceeded(t *testing.T) {
	for _, strategy := range []scheduler.Strategy{scheduler.Spread, scheduler.Binpack, scheduler.RoundRobin, scheduler.Sticky} {
		t.Run(string(strategy), func(t *testing.T) {
			const nodes, perNode = 200, 50
			c := New(nodes, perNode, manyServers, scheduler.Policy{Strategy: strategy})
			tries := 0
			for placed := 0; placed < nodes*perNode; tries++ {
				if tries > 4*nodes*perNode {
					t.Fatalf("%d of %d placed after %d tries", placed, nodes*perNode, tries)
				}
				if tries%1000 == 0 {
					c.Tell()
				}
				if c.Place() {
					placed++
				}
			}
			c.Tell()
			if c.Place() {
				t.Error("a full cluster took another sandbox")
			}
			if over := c.Overcommitted(); over > 0 {
				t.Errorf("%d nodes have more than they can hold", over)
			}
		})
	}
}

func TestPlaceAllocations(t *testing.T) {
	selector, err := scheduler.ParseSelector("zone in (0,1)")
	if err != nil {
		t.Fatal(err)
	}
	for _, nodes := range []int{10, 1000, manyNodes} {
		for _, strategy := range []scheduler.Strategy{scheduler.Spread, scheduler.Binpack, scheduler.RoundRobin, scheduler.Sticky} {
			c := New(nodes, 100, 1, scheduler.Policy{Strategy: strategy, PrioritySelectNum: 3})
			r := scheduler.Request{
				Resources: Small(), Engine: "gvisor", Image: Image, Random: rand.NewPCG(1, 1), Selector: selector, Key: "key",
				Preferences: []scheduler.Preference{{Selector: selector, Weight: 10}},
			}
			got := testing.AllocsPerRun(100, func() { scheduler.Place(c.servers[0].views, r) })
			if got > 10 {
				t.Errorf("%s among %d nodes: %v allocations", strategy, nodes, got)
			}
		}
	}
}

// The whole size, once: 10,000 nodes, 1,000,000 sandboxes, 5 servers.
func BenchmarkMillion(b *testing.B) {
	for b.Loop() {
		c := New(manyNodes, 200, manyServers, scheduler.Policy{})
		began := time.Now()
		fill(b, c, manyBoxes)
		b.ReportMetric(manyBoxes/time.Since(began).Seconds(), "placements/s")
		checkSpread(b, c, manyBoxes)
		fewest, most, _ := c.Spread()
		b.ReportMetric(float64(fewest), "fewest/node")
		b.ReportMetric(float64(most), "most/node")
		if over := c.Overcommitted(); over > 0 {
			b.Errorf("%d nodes have more than they can hold", over)
		}
	}
}

// BenchmarkPlace reports the median of one decision in clusters that are filled to half and to 95 %.
func BenchmarkPlace(b *testing.B) {
	for _, percent := range []int{50, 95} {
		for _, nodes := range []int{10, 100, 1000, manyNodes} {
			c := New(nodes, 100, 1, scheduler.Policy{})
			random := rand.New(rand.NewPCG(1, 1))
			for i := range c.nodes { // unevenly, so that nodes differ and some are full
				for range min(100, max(0, percent+random.IntN(21)-10)) {
					c.admit(i)
				}
			}
			c.Tell()
			r := scheduler.Request{Resources: Small(), Engine: "gvisor", Image: Image, Random: rand.NewPCG(1, 1)}
			b.Run(fmt.Sprintf("full=%d/nodes=%d", percent, nodes), func(b *testing.B) {
				b.ReportAllocs()
				var took []time.Duration
				for b.Loop() {
					began := time.Now()
					scheduler.Place(c.servers[0].views, r)
					took = append(took, time.Since(began))
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
				b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
			})
		}
	}
}
