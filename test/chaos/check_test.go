package chaos

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// scene is a cluster of two nodes that keeps every promise: r runs on one, p is paused there, k was killed.
func scene() (Promises, *View) {
	record := func(id string, state sandbox.State) journal.Record {
		return journal.Record{Sandbox: sandbox.Sandbox{
			ID: sandbox.ID(id), NodeID: "n1", State: state, Resources: sandbox.Resources{MemoryBytes: 10, MilliCPU: 1}, Checkpoint: id + "-saved",
		}}
	}
	tag := map[string]string{tagKey: "1"}
	p := Promises{
		Now:   time.Now(),
		Boxes: map[int]Box{1: {ID: "r", Tag: "1", Belief: Running}, 2: {ID: "p", Tag: "1", Belief: Paused}},
		Dead:  map[string]struct{}{"k": {}}, Tags: map[string]struct{}{"1": {}},
	}
	room := sandbox.Resources{MemoryBytes: 20, MilliCPU: 20}
	return p, &View{
		Sandboxes: map[string]client.Sandbox{
			"r": {ID: "r", NodeID: "n1", State: "running", Metadata: tag}, "p": {ID: "p", NodeID: "n1", State: "paused", Metadata: tag},
			"k": {ID: "k", State: "deleted"},
		},
		Nodes: []client.Node{{Name: "one", State: "ready"}, {Name: "two", State: "ready"}},
		Machines: []MachineView{
			{
				Name: "one", NodeID: "n1", Capacity: room, Records: []journal.Record{record("r", "running"), record("p", "paused")},
				Sentries: map[string][]int{"r": {1}}, Groups: []string{"r"}, Links: 2, Spare: 1,
				Checkpoints: map[string]time.Duration{"p-saved": time.Hour},
			},
			{Name: "two", NodeID: "n2", Capacity: room, Checkpoints: map[string]time.Duration{"p-saved": time.Hour}},
		},
		Routed: map[string]bool{"k": false}, Up: 3 * time.Hour,
	}
}

func TestCheck(t *testing.T) {
	set := func(v *View, id string, change func(*client.Sandbox)) {
		s := v.Sandboxes[id]
		change(&s)
		v.Sandboxes[id] = s
	}
	lose := func(v *View) {
		set(v, "r", func(s *client.Sandbox) { s.State, s.EndedAt = "lost", time.Now() })
		v.Machines[0].Records[0].State = "lost"
		v.Machines[0].Sentries, v.Machines[0].Groups, v.Machines[0].Links = nil, nil, 1
	}
	for _, tt := range []struct {
		name  string
		spoil func(*Promises, *View)
		want  []string
	}{
		{"all is well", func(*Promises, *View) {}, nil},
		{"a node is down", func(_ *Promises, v *View) { v.Nodes[1].State = "down" }, []string{"stuck"}},
		{"forgotten", func(_ *Promises, v *View) { delete(v.Sandboxes, "r") }, []string{"lost", "orphan"}},
		{"lost", func(_ *Promises, v *View) { lose(v) }, []string{"lost"}},
		{"lost with its machine", func(p *Promises, v *View) { lose(v); p.Boxes[1] = Box{ID: "r", Excused: true} }, nil},
		{"lost without a time", func(p *Promises, v *View) {
			lose(v)
			p.Boxes[1] = Box{ID: "r", Excused: true}
			set(v, "r", func(s *client.Sandbox) { s.EndedAt = time.Time{} })
		}, []string{"lost"}},
		{"a kill without an answer", func(p *Promises, v *View) { lose(v); p.Boxes[1] = Box{ID: "r", Belief: Doomed} }, nil},
		{"its time is up", func(p *Promises, v *View) {
			lose(v)
			p.Boxes[1] = Box{ID: "r", Belief: Running, Ends: p.Now, EndsBy: p.Now}
		}, nil},
		{"early", func(p *Promises, v *View) {
			lose(v)
			p.Boxes[1] = Box{ID: "r", Belief: Running, Ends: p.Now.Add(2 * early), EndsBy: p.Now.Add(2 * early)}
		}, []string{"lost"}},
		{"late", func(p *Promises, _ *View) {
			p.Boxes[1] = Box{ID: "r", Belief: Running, Ends: p.Now.Add(-time.Hour), EndsBy: p.Now.Add(-time.Hour)}
		}, []string{"late"}},
		{"paused in time", func(p *Promises, _ *View) {
			p.Boxes[2] = Box{ID: "p", Belief: Running, Pauses: true, Ends: p.Now, EndsBy: p.Now}
		}, nil},
		{"paused early", func(p *Promises, _ *View) {
			p.Boxes[2] = Box{ID: "p", Belief: Running, Pauses: true, Ends: p.Now.Add(time.Hour), EndsBy: p.Now.Add(time.Hour)}
		}, []string{"lost"}},
		{"soon over", func(p *Promises, _ *View) {
			p.Boxes[1] = Box{ID: "r", Belief: Running, Ends: p.Now.Add(-time.Hour), EndsBy: p.Now}
		}, nil},
		{"resumed by nobody", func(p *Promises, _ *View) { p.Boxes[1] = Box{ID: "r", Belief: Paused} }, []string{"lost"}},
		{"paused or running", func(p *Promises, _ *View) { p.Boxes[1] = Box{ID: "r", Belief: Unsure} }, nil},
		{"stuck", func(_ *Promises, v *View) {
			v.Machines[0].Records[1].State = "resuming"
			set(v, "p", func(s *client.Sandbox) { s.State = "resuming" })
		}, []string{"lost", "stuck"}},
		{"the server is behind", func(_ *Promises, v *View) { v.Machines[0].Records[0].State = "paused" }, []string{"orphan", "orphan", "orphan", "stuck"}},
		{"two homes", func(_ *Promises, v *View) { v.Machines[1].Records = v.Machines[0].Records[1:] }, []string{"stuck", "twice"}},
		{"no process", func(_ *Promises, v *View) { v.Machines[0].Sentries = nil }, []string{"lost"}},
		{"a stray process", func(_ *Promises, v *View) { v.Machines[1].Sentries = map[string][]int{"r": {2}} }, []string{"orphan"}},
		{"a stray control group", func(_ *Promises, v *View) { v.Machines[0].Groups = []string{"r", "p"} }, []string{"orphan"}},
		{"stray links", func(_ *Promises, v *View) { v.Machines[0].Links = 3 }, []string{"orphan"}},
		{"a stray checkpoint", func(_ *Promises, v *View) { v.Machines[1].Checkpoints["x"] = time.Hour }, []string{"orphan"}},
		{"a stray checkpoint of before the server", func(_ *Promises, v *View) { v.Machines[1].Checkpoints["x"], v.Up = time.Hour, time.Second }, nil},
		{"a part of a checkpoint", func(_ *Promises, v *View) { v.Machines[1].Checkpoints[".partial-x"] = time.Hour }, nil},
		{"an old part", func(_ *Promises, v *View) { v.Machines[1].Checkpoints[".partial-x"] = 2 * time.Hour }, []string{"orphan"}},
		{"a checkpoint that is new", func(_ *Promises, v *View) { v.Machines[1].Checkpoints["x"] = time.Second }, nil},
		{"a stray sandbox", func(p *Promises, _ *View) { p.Tags = nil }, []string{"orphan", "orphan"}},
		{"back from the dead", func(_ *Promises, v *View) { v.Routed["k"] = true }, []string{"orphan"}},
		{"too much", func(_ *Promises, v *View) { v.Machines[0].Capacity.MemoryBytes = 9 }, []string{"overcommit"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, v := scene()
			tt.spoil(&p, v)
			var got []string
			for _, violation := range Check(p, v) {
				got = append(got, violation.Rule)
			}
			if diff := cmp.Diff(sorted(tt.want), sorted(got)); diff != "" {
				t.Errorf("(-want +got):\n%s\n%+v", diff, Check(p, v))
			}
		})
	}
}

func TestTwice(t *testing.T) {
	all := map[string]map[string][]int{"one": {"a": {1}, "b": {2}}, "two": {"c": {3}}}
	if got := Twice(all); got != nil {
		t.Errorf("%+v", got)
	}
	all["two"]["a"] = []int{4}
	if got := Twice(all); len(got) != 1 || got[0].ID != "a" {
		t.Errorf("%+v; want a alone", got)
	}
}

// Of a sandbox that moves there are processes at both ends, of which none runs, or one.
func TestStanding(t *testing.T) {
	record := func(state sandbox.State) []journal.Record {
		return []journal.Record{{Sandbox: sandbox.Sandbox{ID: "a", State: state}}}
	}
	for _, tt := range []struct {
		one, two sandbox.State
		want     int
	}{
		{"migrating", "migrating", 0}, {"migrating", "running", 0}, {"running", "deleted", 0}, {"running", "running", 1}, {"pausing", "resuming", 1},
	} {
		all := map[string]map[string][]int{"one": {"a": {1}}, "two": {"a": {2}}}
		Standing(all["one"], record(tt.one))
		Standing(all["two"], record(tt.two))
		if got := Twice(all); len(got) != tt.want {
			t.Errorf("%s and %s: %+v", tt.one, tt.two, got)
		}
	}
	both := map[string][]int{"a": {1, 2}}
	Standing(both, record("migrating"))
	if len(Twice(map[string]map[string][]int{"one": both})) != 1 {
		t.Error("two processes of one sandbox on one machine are allowed")
	}
}

func TestMissing(t *testing.T) {
	b := Box{Tried: 4, Written: []int{1, 3}}
	for _, tt := range []struct {
		text          string
		lost, strange int
	}{
		{"1\n3\n", 0, 0}, {"1\n2\n3\n4\n", 0, 0}, {"1\n", 1, 0}, {"", 2, 0}, {"1\n3\n5\n", 0, 1}, {"1\n3\n3\n", 0, 1}, {"1\n3\nx\n", 0, 1},
	} {
		if lost, strange := b.missing(tt.text); len(lost) != tt.lost || len(strange) != tt.strange {
			t.Errorf("%q: lost %v, strange %q", tt.text, lost, strange)
		}
	}
}

func sorted(all []string) []string {
	out := slices.Clone(all)
	slices.Sort(out)
	return out
}
