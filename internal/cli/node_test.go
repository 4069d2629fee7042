package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNodeAdministration(t *testing.T) {
	w := newWorld(t)
	steps := []struct {
		args string
		want []string
	}{
		{"node show node-aaaaaa", []string{"ready, since", "cloister.dev/arch=amd64"}},
		{"node label node-aaaaaa zone=eu disk=nvme", []string{"disk=nvme", "zone=eu"}},
		{"node label aaaaaa disk-", []string{"zone=eu"}},
		{"node taint aaaaaa gpu=only:NoSchedule old:PreferNoSchedule", []string{"gpu=only:NoSchedule,old:PreferNoSchedule"}},
		{"schedule explain -t base", []string{"refuse", "taint gpu=only:NoSchedule"}},
		{"schedule explain --tolerations * --selector zone=eu --cpu 1 --memory 1GiB", []string{"accept", "node-aaaaaa"}},
		{"node taint aaaaaa gpu- old:PreferNoSchedule-", []string{"taints"}},
		{"node cordon aaaaaa --reason disk", []string{"cordoned, since", "disk"}},
		{"node ls", []string{"cordoned"}},
		{"schedule explain", []string{"is cordoned"}},
		{"node uncordon aaaaaa", []string{"ready, since"}},
		{"schedule show", []string{`"strategy": "spread"`}},
		{"schedule reset -o json", []string{`"source": "settings"`}},
	}
	for _, s := range steps {
		out := w.must(strings.Fields(s.args)...)
		for _, want := range s.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %s\nlacks %q", s.args, out, want)
			}
		}
	}
}

func TestWrapped(t *testing.T) {
	words := strings.Fields(strings.Repeat("avx512_vp2intersect ", 20))
	lines := wrapped(words)
	if got := strings.Fields(strings.Join(lines, " ")); len(got) != len(words) || len(lines) != 5 {
		t.Errorf("%d words in %d lines: %q", len(got), len(lines), lines)
	}
	for _, line := range lines {
		if len(line) > 90 {
			t.Errorf("a line of %d", len(line))
		}
	}
	if got := wrapped(nil); len(got) != 1 || got[0] != "" {
		t.Errorf("of nothing: %q", got)
	}
}

func TestScheduleSet(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "policy.json")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"strategy":"binpack","sample":4}`)
	if out := w.must("schedule", "set", file, "-o", "json"); !strings.Contains(out, `"source": "api"`) || !strings.Contains(out, `"sample": 4`) {
		t.Error(out)
	}
	write(w.must("schedule", "show"))
	w.must("schedule", "set", file) // what is shown can be given back
	for text, want := range map[string]string{`{"strategy":"fast"}`: "round_robin", `{"speed":1}`: "speed", "x": "invalid character"} {
		write(text)
		if r := w.do("schedule", "set", file); r.code != exitUsage || !strings.Contains(r.err, want) {
			t.Errorf("%s: %+v", text, r)
		}
	}
	if out := w.must("schedule", "show"); !strings.Contains(out, "binpack") {
		t.Error(out)
	}
}

func TestNodeUsage(t *testing.T) {
	w := newWorld(t)
	for args, want := range map[string]string{
		"node label aaaaaa":           "want a node and labels",
		"node label aaaaaa zone":      "KEY=VALUE to set it",
		"node taint aaaaaa gpu":       "NoSchedule",
		"node cordon":                 "one node",
		"schedule explain --memory x": "512MiB",
	} {
		if r := w.do(strings.Fields(args)...); r.code != exitUsage || !strings.Contains(r.err, want) {
			t.Errorf("%s: %+v", args, r)
		}
	}
	if r := w.do("node", "show", "nobody"); r.code != exitNotFound {
		t.Errorf("%+v", r)
	}
}
