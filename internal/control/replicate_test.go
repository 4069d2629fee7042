package control

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// viewOf returns three nodes that are ready, of which the first has a paused sandbox.
func viewOf() *copyView {
	node := func(id sandbox.NodeID, load float64) nodeView {
		return nodeView{id: id, ready: true, open: true, load: load, has: map[string]struct{}{}, replicas: map[string]time.Time{}}
	}
	return &copyView{
		now: time.Unix(10_000, 0), nodes: []nodeView{node("a", 0), node("b", 0.5), node("c", 0.2)},
		paused:  []sandbox.Sandbox{{ID: "s", NodeID: "a", State: sandbox.StatePaused, Generation: 4, Checkpoint: "p"}},
		records: map[sandbox.ID]sandbox.Replica{}, popular: map[string]bool{}, limits: Limits{SnapshotReplicas: 2}.withDefaults(),
		skip: func(string) bool { return false }, bereft: func(sandbox.ID) bool { return false },
	}
}

func machine(arch, version string) *sandbox.Origin {
	return &sandbox.Origin{Architecture: arch, EngineVersion: version}
}

func kept(v *copyView) sandbox.Replica {
	r := sandbox.Replica{ID: "s", Home: "a", Generation: 4, Checkpoint: "p", Holders: []sandbox.NodeID{"c"}}
	v.records["s"] = r
	v.nodes[2].replicas["p"] = time.Unix(9_000, 0)
	return r
}

// lost has the home say that it does not have the sandbox.
func lost(v *copyView) {
	v.bereft = func(sandbox.ID) bool { return true }
	v.paused[0].Checkpoint = ""
}

func TestPlanCopies(t *testing.T) {
	tests := []struct {
		name   string
		change func(*copyView)
		want   []string
	}{
		{"copied to the least used", func(*copyView) {}, []string{"guard/c/s"}},
		{"not to a node that is cordoned", func(v *copyView) { v.nodes[2].open = false }, []string{"guard/b/s"}},
		{"not to a node of another kind", func(v *copyView) {
			v.nodes[0].machine, v.nodes[1].machine, v.nodes[2].machine = machine("amd64", "v1"), machine("arm64", "v1"), machine("amd64", "v2")
		}, nil},
		{"not where that has just failed", func(v *copyView) { v.skip = func(key string) bool { return key == "guard/c/s" } }, []string{"guard/b/s"}},
		{"not from a node that is silent", func(v *copyView) { v.nodes[0].ready = false }, nil},
		{"to the bucket too", func(v *copyView) { v.limits.Bucket = true }, []string{"guard//s", "guard/c/s"}},
		{"enough", func(v *copyView) { kept(v) }, nil},
		{"a holder is given up", func(v *copyView) { kept(v); v.nodes[2].ready, v.nodes[2].givenUp = false, true }, []string{"guard/b/ss"}},
		{"a record of before", func(v *copyView) { kept(v); v.paused[0].Generation = 6 }, []string{"unrecord//s", "guard/c/s"}},
		{"it runs", func(v *copyView) { kept(v); v.paused = nil }, []string{"unrecord//s"}},
		{"its home is silent", func(v *copyView) { kept(v); v.nodes[0].ready = false }, nil},
		{"its home is given up", func(v *copyView) { kept(v); v.nodes[0].ready, v.nodes[0].givenUp = false, true }, []string{"recover/c/s"}},
		{"its holder is of another kind by now", func(v *copyView) {
			r := kept(v)
			r.MadeOn = machine("amd64", "v1")
			v.records["s"] = r
			v.nodes[0].ready, v.nodes[0].givenUp = false, true
			v.nodes[0].machine, v.nodes[2].machine = machine("amd64", "v2"), machine("amd64", "v2")
		}, nil},
		{"its home is of another kind by now", func(v *copyView) {
			r := kept(v)
			r.MadeOn, r.Bucket, r.Holders = machine("amd64", "v1"), true, nil
			v.records["s"] = r
			v.nodes[0].ready, v.nodes[0].givenUp, v.nodes[0].machine = false, true, machine("amd64", "v2")
			v.nodes[1].machine, v.nodes[2].machine = machine("amd64", "v1"), machine("amd64", "v2")
		}, []string{"recover/b/s"}},
		{"its home was removed", func(v *copyView) { kept(v); v.nodes = v.nodes[1:] }, []string{"recover/c/s"}},
		{"nobody has it", func(v *copyView) { kept(v); v.nodes = v.nodes[1:]; v.nodes[1].ready = false }, nil},
		{"the bucket has it", func(v *copyView) {
			r := kept(v)
			r.Bucket, r.Holders = true, nil
			v.records["s"] = r
			v.nodes = v.nodes[1:]
		}, []string{"recover/c/s"}},
		{"it was on its way back", func(v *copyView) {
			r := kept(v)
			r.Home, r.Returning, r.Holders = "c", true, nil
			v.records["s"] = r
			v.paused = nil
		}, []string{"finish/c/s"}},
		{"its home has lost it", func(v *copyView) { kept(v); lost(v) }, []string{"recover/c/s"}},
		{"its home has lost it and nobody else has it", func(v *copyView) { kept(v); lost(v); clear(v.nodes[2].replicas) }, nil},
		{"its home has lost it and the bucket has it", func(v *copyView) {
			r := kept(v)
			r.Bucket, r.Holders = true, nil
			v.records["s"] = r
			lost(v)
			v.nodes = v.nodes[:1]
			clear(v.nodes[0].replicas)
		}, []string{"recover/a/s"}},
		{"a holder has lost it", func(v *copyView) { kept(v); clear(v.nodes[2].replicas) }, []string{"guard/c/ss"}},
		{"nothing needs it in the bucket", func(v *copyView) { v.stored = []string{"old", "p"}; kept(v) }, []string{"unstore/a/old"}},
		{"it is being removed from the bucket", func(v *copyView) {
			v.stored, v.writing, v.limits.Bucket = []string{"p"}, map[string]struct{}{"p": {}}, true
			kept(v)
		}, nil},
		{"it is to come to the bucket, where it may be", func(v *copyView) { v.stored, v.limits.Bucket = []string{"p"}, true; kept(v) }, []string{"guard//ss"}},
		{"a replica that nothing needs", func(v *copyView) { kept(v); v.nodes[1].replicas["old"] = time.Unix(9_000, 0) }, []string{"forget/b/old"}},
		{"one that may be recorded soon", func(v *copyView) { kept(v); v.nodes[1].replicas["old"] = time.Unix(9_990, 0) }, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := viewOf()
			tt.change(v)
			var got []string
			for _, j := range planCopies(v, 10) {
				got = append(got, j.key())
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestPlanCopiesIsBounded(t *testing.T) {
	v := viewOf()
	for i := range 1000 {
		id := sandbox.ID(fmt.Sprint("x", i))
		v.paused = append(v.paused, sandbox.Sandbox{ID: id, NodeID: "a", State: sandbox.StatePaused, Generation: 1, Checkpoint: string(id)})
	}
	if n := len(planCopies(v, 4)); n != 4 {
		t.Errorf("%d jobs", n)
	}
}

func TestPlanSpreads(t *testing.T) {
	all, two := -1, 2
	build := sandbox.Build{ID: "b1", State: sandbox.BuildReady, ImageDigest: "sha256:1"}
	for name, tt := range map[string]struct {
		change func(*copyView, *sandbox.Template)
		want   int
	}{
		"on demand":     {func(*copyView, *sandbox.Template) {}, 0},
		"all":           {func(_ *copyView, t *sandbox.Template) { t.Placement = &all }, 2},
		"two":           {func(_ *copyView, t *sandbox.Template) { t.Placement = &two }, 1},
		"of all":        {func(v *copyView, _ *sandbox.Template) { v.limits.TemplatePlacement = -1 }, 2},
		"a snapshot":    {func(_ *copyView, t *sandbox.Template) { t.Kind = sandbox.TemplateSnapshot }, 1},
		"popular":       {func(v *copyView, _ *sandbox.Template) { v.popular["b1"], v.nodes[1].joined = true, true }, 1},
		"untagged":      {func(_ *copyView, t *sandbox.Template) { t.Placement, t.Tags = &all, nil }, 0},
		"nobody has it": {func(v *copyView, t *sandbox.Template) { t.Placement = &all; clear(v.nodes[0].has) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			v := viewOf()
			v.paused = nil
			v.nodes[0].has["sha256:1"] = struct{}{}
			template := sandbox.Template{ID: "t", Builds: []sandbox.Build{build}, Tags: map[string]sandbox.Tag{"default": {BuildID: "b1"}}}
			tt.change(v, &template)
			v.templates = []sandbox.Template{template}
			if got := planCopies(v, 10); len(got) != tt.want {
				t.Errorf("%d jobs: %+v", len(got), got)
			}
		})
	}
}

// A node whose link breaks again and again registers each time: what nothing needs there goes all the same.
func TestReplicasAgeAcrossRegistrations(t *testing.T) {
	p, first := newCopies(), time.Unix(1000, 0)
	p.registered("n", []string{"a", "b"}, first)
	later := first.Add(forgetAfter / 2)
	p.registered("n", []string{"a", "c"}, later)
	want := map[string]time.Time{"a": first, "c": later}
	if diff := cmp.Diff(want, p.replicas["n"]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
