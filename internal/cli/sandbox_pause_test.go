package cli

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestPauseAndResume(t *testing.T) {
	w := newWorld(t)
	if out := w.must("sandbox", "pause", w.id); out != w.id+"\n" {
		t.Error(out)
	}
	if list := w.must("sandbox", "ls"); !strings.Contains(list, "paused 0s ago, ") {
		t.Error(list)
	}
	if show := w.must("sandbox", "show", w.id); !strings.Contains(show, "on disk") {
		t.Error(show)
	}
	if status := w.must("status"); !strings.Contains(status, "1 paused") {
		t.Error(status)
	}
	if out := w.must("__complete", "sandbox", "resume", ""); !strings.Contains(out, w.id) {
		t.Error(out)
	}
	if r := w.do("sandbox", "pause", w.id, "nope"); r.code == 0 || !strings.Contains(r.err, "nope") {
		t.Errorf("%+v", r)
	}
	if out := w.must("sandbox", "resume", w.id, "--timeout", "1h"); out != w.id+"\n" {
		t.Error(out)
	}
	if list := w.must("sandbox", "ls", "--state", "running"); !strings.Contains(list, "in 59m") {
		t.Error(list)
	}
}

func TestSnapshots(t *testing.T) {
	w := newWorld(t)
	id := strings.TrimSpace(w.must("sandbox", "snapshot", w.id, "--name", "before"))
	for _, args := range []string{"snapshot ls", "snapshot ls --sandbox " + w.id, "snapshot show before", "snapshot show " + id, "template ls --all", "__complete snapshot rm b", "__complete sandbox rollback " + w.id + " "} {
		if out := w.must(strings.Fields(args + " ")...); !strings.Contains(out, "before") && !strings.HasPrefix(args, "__complete") {
			t.Errorf("%s: %s", args, out)
		}
	}
	if list := w.must("template", "ls"); strings.Contains(list, "before") {
		t.Error(list)
	}
	if out := w.must("sandbox", "rollback", w.id, "before"); out != w.id+"\n" {
		t.Error(out)
	}
	if out := w.must("sandbox", "fork", w.id, "--count", "3"); strings.Count(out, "\n") != 3 {
		t.Error(out)
	}
	w.must("sandbox", "create", "-t", "before", "--auto-pause")
	if r := w.do("snapshot", "rm", "nope", "before"); r.code != exitNotFound || r.out != "before\n" {
		t.Errorf("%+v", r)
	}
	var left []any
	if err := json.Unmarshal([]byte(w.must("snapshot", "ls", "-o", "json")), &left); err != nil || len(left) != 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// The tiers measure the fakes, which says nothing; but they come to their end, and leave nothing.
func TestBenchPause(t *testing.T) {
	w := newWorld(t)
	var report benchReport
	if err := json.Unmarshal([]byte(w.must("bench", "--tier", "pause,resume,snapshot,fork", "--count", "4", "-o", "json")), &report); err != nil {
		t.Fatal(err)
	}
	if p := report.Tiers["pause"].Series; len(p) != 1 || len(p[0].Samples) != 4 || p[0].Target != pauseTarget {
		t.Errorf("%+v", p)
	}
	if left := w.must("sandbox", "ls"); strings.Count(left, "\n") != 2 {
		t.Errorf("sandboxes are left:\n%s", left)
	}
}

func TestTarget50(t *testing.T) {
	for want, s := range map[string]series{
		"-": {Samples: []float64{1}}, "met: 2": {Target: 2, Samples: []float64{1, 2, 9}}, "missed: 2": {Target: 2, Samples: []float64{3}},
	} {
		if got := s.target(); got != want {
			t.Errorf("%v: %q, want %q", s, got, want)
		}
	}
}
