package control

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func boxAt(id string, at time.Time, gen int64, state sandbox.State) sandbox.Sandbox {
	return sandbox.Sandbox{ID: sandbox.ID(id), NodeID: "aaaaaa", StartedAt: at, Generation: gen, State: state}
}

func TestIndexKeepsTheNewest(t *testing.T) {
	type news struct {
		gen, seq int64
		state    sandbox.State
	}
	tests := []struct {
		name string
		news []news
		want sandbox.State
	}{
		{"the report after the answer", []news{{1, 0, "running"}, {1, 4, "running"}}, "running"},
		{"the answer after the report", []news{{2, 7, "deleted"}, {1, 0, "running"}}, "deleted"},
		{"a late report", []news{{3, 9, "failed"}, {2, 8, "running"}}, "failed"},
		{"the same report again", []news{{1, 4, "running"}, {1, 4, "failed"}}, "running"},
		{"a sandbox that came back", []news{{3, 9, "lost"}, {4, 10, "running"}}, "running"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x := newIndex(time.Hour, 10)
			now := time.Now()
			for _, n := range tt.news {
				x.apply(&entry{box: boxAt("i1", now, n.gen, n.state), sequence: n.seq}, now)
			}
			if got, _ := x.get("i1"); got.State != tt.want {
				t.Errorf("state %s, want %s", got.State, tt.want)
			}
		})
	}
}

// The index must agree with the plainest possible one after any series of changes.
func TestIndexAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	x := newIndex(time.Hour, 1<<30)
	model := map[sandbox.ID]sandbox.Sandbox{}
	base := time.Unix(1_700_000_000, 0)
	states := []sandbox.State{sandbox.StateRunning, sandbox.StatePaused, sandbox.StateFailed, sandbox.StateDeleted}
	for step := range 30_000 {
		id := sandbox.ID(fmt.Sprint("i", r.IntN(3000)))
		next := boxAt(string(id), base.Add(time.Duration(r.IntN(500))*time.Second), int64(step), states[r.IntN(len(states))])
		if old, ok := model[id]; ok && r.IntN(2) == 0 {
			next.StartedAt = old.StartedAt
		}
		x.apply(&entry{box: next}, base)
		model[id] = next
	}
	var want []sandbox.Sandbox
	counts := map[sandbox.State]int{}
	for _, b := range model {
		if b.State != sandbox.StateDeleted {
			want = append(want, b)
			counts[b.State]++
		}
	}
	slices.SortFunc(want, func(a, b sandbox.Sandbox) int {
		return cmp.Or(a.StartedAt.Compare(b.StartedAt), cmp.Compare(a.ID, b.ID))
	})
	first, last := ends()
	for _, newest := range []bool{false, true} {
		from := first
		if newest {
			from = last
			slices.Reverse(want)
		}
		var got []sandbox.ID
		x.scan(newest, from, func(e *entry) bool { got = append(got, e.box.ID); return true })
		if len(got) != len(want) {
			t.Fatalf("newest first %v: %d listed, want %d", newest, len(got), len(want))
		}
		for i := range got {
			if got[i] != want[i].ID {
				t.Fatalf("newest first %v: entry %d is %s, want %s", newest, i, got[i], want[i].ID)
			}
		}
	}
	for s, n := range counts {
		if x.states()[s] != n {
			t.Errorf("%d %s, want %d", x.states()[s], s, n)
		}
	}
}

func TestIndexForgetsTheEnded(t *testing.T) {
	x := newIndex(time.Hour, 5)
	now := time.Unix(1000, 0)
	for i := range 8 {
		x.apply(&entry{box: boxAt(fmt.Sprint("i", i), now, 1, sandbox.StateFailed)}, now)
	}
	for i := range 8 {
		if _, ok := x.get(sandbox.ID(fmt.Sprint("i", i))); ok != (i >= 3) {
			t.Errorf("i%d: known %v", i, ok)
		}
	}
	x.prune(now.Add(2 * time.Hour))
	if len(x.byID) != 0 || len(x.order.chunks) != 0 || len(x.ended) != 0 || x.states()[sandbox.StateFailed] != 0 {
		t.Errorf("left over: %d known, %d chunks, %d ended", len(x.byID), len(x.order.chunks), len(x.ended))
	}
}

func fillIndex(tb testing.TB, n int) *index {
	tb.Helper()
	x := newIndex(time.Hour, 1000)
	base := time.Unix(1_700_000_000, 0)
	for i := range n {
		b := sandbox.Sandbox{
			ID: sandbox.NewID("aaaaaa"), NodeID: sandbox.NodeID(shared("aaaaaa")), TemplateID: sandbox.TemplateID(shared("bbbbbbbbbbbbbbbbbbbb")),
			TemplateName: shared("base"), State: sandbox.StateRunning, Generation: 1, Secure: true,
			StartedAt: base.Add(time.Duration(i) * time.Millisecond), EndAt: base.Add(time.Hour), GuestVersion: shared("0.6.13"),
		}
		x.apply(&entry{box: b}, base)
	}
	return x
}

func BenchmarkIndexBytes(b *testing.B) {
	const n = 200_000
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		x := fillIndex(b, n)
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/sandbox")
		runtime.KeepAlive(x)
	}
}

func BenchmarkIndexApply(b *testing.B) {
	x := fillIndex(b, 100_000)
	now := time.Now()
	b.ReportAllocs()
	for i := int64(0); b.Loop(); i++ {
		x.apply(&entry{box: boxAt("i"+strconv.FormatInt(i%50_000, 10), now.Add(time.Duration(i)), i, sandbox.StateRunning)}, now)
	}
}
