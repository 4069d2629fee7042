package gvisor

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/enginetest"
)

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) enginetest.Machine {
		t.Helper()
		p := newPlace(t)
		return enginetest.Machine{
			Open:    func(t *testing.T) engine.Engine { t.Helper(); return p.open(t) },
			Resting: func(t *testing.T) engine.Spec { t.Helper(); return p.spec(t, "sleep") },
			Exiting: func(t *testing.T, code int) engine.Spec { t.Helper(); return p.spec(t, "exit", strconv.Itoa(code)) },
			Broken: func(t *testing.T) engine.Spec {
				t.Helper()
				s := p.spec(t)
				s.Args = []string{"/no-such-program"}
				return s
			},
			Left: p.left,
		}
	})
}

// left returns what is on the machine of the guests of p.
func (p place) left(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, dir := range []string{p.root, p.scratch} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	for _, parent := range p.open(t).cgroups.parents() {
		entries, err := os.ReadDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				out = append(out, filepath.Join(parent, e.Name()))
			}
		}
	}
	return append(out, zombies(t)...)
}

// zombies returns the children of this process that nobody has reaped.
func zombies(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, pid := range descendants(os.Getpid()) {
		raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
		if err == nil {
			out = append(out, "process "+strconv.Itoa(pid)+" "+string(raw))
		}
	}
	return out
}
