package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

func TestPercentile(t *testing.T) {
	hundred := series{}
	for i := range 100 {
		hundred.Samples = append(hundred.Samples, float64(100-i))
	}
	for _, tc := range []struct {
		s       series
		p, want float64
	}{
		{series{}, 50, 0},
		{series{Samples: []float64{7}}, 0, 7},
		{series{Samples: []float64{7}}, 99, 7},
		{series{Samples: []float64{3, 1, 2}}, 50, 2},
		{series{Samples: []float64{4, 3, 2, 1}}, 50, 2},
		{hundred, 0, 1},
		{hundred, 50, 50},
		{hundred, 95, 95},
		{hundred, 99, 99},
		{hundred, 100, 100},
	} {
		if got := tc.s.percentile(tc.p); got != tc.want {
			t.Errorf("p%v of %v = %v, want %v", tc.p, tc.s.Samples, got, tc.want)
		}
	}
	if hundred.Samples[0] != 100 {
		t.Error("percentile sorted the samples themselves")
	}
}

func TestFigure(t *testing.T) {
	for in, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.5: "0.500", 1: "1.0", 99.94: "99.9", 1234.5: "1234"} {
		if got := figure(in); got != want {
			t.Errorf("figure(%v) = %q, want %q", in, got, want)
		}
	}
}

func TestBench(t *testing.T) {
	w := newWorld(t)
	// Every sandbox of the fakes shares one agent, so only the tiers that need none run to their end.
	out := w.must("bench", "--tier", "parallel,idle", "--parallel", "3", "-o", "json")
	var report benchReport
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	if p := report.Tiers["parallel"]; len(p.Series[0].Samples) != 3 || len(p.Errors) > 0 {
		t.Errorf("%+v", p)
	}
	if e := report.Tiers["idle"].Errors; len(e) != 1 || !strings.Contains(e[0], "only on the daemon's machine") {
		t.Errorf("%q", e)
	}
	if left := w.must("sandbox", "ls"); strings.Count(left, "\n") != 2 {
		t.Errorf("sandboxes are left:\n%s", left)
	}
}

// What was made when the interrupt came is ended all the same.
func TestBenchInterrupted(t *testing.T) {
	w := newWorld(t)
	cn, err := (&target{apiURL: value(w.env, "E2B_API_URL"), key: value(w.env, "E2B_API_KEY"), flagged: func(string) bool { return false }}).connect()
	if err != nil {
		t.Fatal(err)
	}
	defer cn.http.CloseIdleConnections()
	defer cn.api.Close()
	ctx, cancel := context.WithCancel(t.Context())
	b := &bench{cn: cn, template: "base"}
	made, _, failures := b.crowd(ctx, 3, 2)
	cancel()
	if len(made) != 3 || len(failures) > 0 {
		t.Fatalf("%v, %v", made, failures)
	}
	if _, _, failures := b.crowd(ctx, 3, 2); len(failures) != 3 {
		t.Errorf("creates begin after the interrupt: %v", failures)
	}
	b.killAll(ctx, made)
	if left := w.must("sandbox", "ls"); strings.Count(left, "\n") != 2 {
		t.Errorf("sandboxes are left:\n%s", left)
	}
}

func value(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// A command of our own that does not succeed is an error with a text, not the exit code of the program.
func TestCommandFails(t *testing.T) {
	w := newWorld(t)
	w.guest.run = func(p *fakeProcess) (*process.ProcessEvent_EndEvent, error) {
		p.stderr(bytes.Repeat([]byte("no such thing\x1b "), 1000))
		return exited(3)
	}
	a := &app{environ: w.env, target: target{
		apiURL: value(w.env, "E2B_API_URL"), key: value(w.env, "E2B_API_KEY"), sandboxURL: value(w.env, "E2B_SANDBOX_URL"),
		flagged: func(string) bool { return false },
	}}
	defer a.target.close()
	g, err := a.guestOf(t.Context(), w.id, "")
	if err != nil {
		t.Fatal(err)
	}
	err = g.command(t.Context(), "thing")
	if err == nil || !strings.Contains(err.Error(), "thing ended with exit code 3") || len(err.Error()) > 20<<10 || strings.ContainsRune(err.Error(), '\x1b') {
		t.Error(err)
	}
}

func TestFormats(t *testing.T) {
	for in, want := range map[int64]string{0: "0B", 1023: "1023B", 1024: "1KiB", 1536: "1.5KiB", 512 << 20: "512MiB", 3 << 40: "3TiB", 1 << 52: "4096TiB"} {
		if got := size(in); got != want {
			t.Errorf("size(%d) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[int64]string{0: "0", 500: "0.5", 1000: "1", 1250: "1.25", 128000: "128"} {
		if got := cpus(in); got != want {
			t.Errorf("cpus(%d) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[time.Duration]string{0: "0s", 61 * time.Second: "1m01s", 125 * time.Minute: "2h05m", 50 * time.Hour: "2d02h"} {
		if got := span(in); got != want {
			t.Errorf("span(%v) = %q, want %q", in, got, want)
		}
	}
	if ago(time.Time{}) != "-" || in(time.Time{}) != "never" || in(time.Now().Add(-time.Hour)) != "now" {
		t.Error("times that are not")
	}
	if got := printable("a\tb\x1b[2Jé\n\u202e"); got != "a�b�[2Jé��" {
		t.Errorf("%q", got)
	}
	if got := pairs(map[string]string{"b": "2", "a": "1"}); got != "a=1,b=2" {
		t.Error(got)
	}
}

func TestTablesLineUp(t *testing.T) {
	w := newWorld(t)
	table := w.must("node", "ls") + w.must("template", "ls")
	lines := strings.Split(strings.TrimSpace(table), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		head, body := lines[i], lines[i+1]
		for _, name := range strings.Fields(head)[1:] {
			at := strings.Index(head, " "+name) + 1
			if at >= len(body) || body[at] == ' ' || body[at-1] != ' ' {
				t.Errorf("column %s does not line up:\n%s\n%s", name, head, body)
			}
		}
	}
}

func TestProgressPlain(t *testing.T) {
	var b strings.Builder
	p := newProgress(&b)
	for _, f := range []float64{0, 0.01, 0.05, 0.11, 0.12, 2} {
		p.update("pull", f)
	}
	p.line("done")
	p.end()
	if want := "  0%  pull\n 11%  pull\n100%  pull\n      done\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

func TestProgressTerminal(t *testing.T) {
	var b strings.Builder
	p := &progress{w: &b, width: 40}
	p.update("a step with a long name", 0.5)
	p.line("news")
	if want := "\r\x1b[K[###############...............]  50%  \r\x1b[K      news\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}
