package gvisor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/enginetest"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(t *testing.T) enginetest.Machine {
		t.Helper()
		p, wires := newPlace(t), wires{}
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
			Holding: func(t *testing.T) engine.Spec {
				t.Helper()
				return wires.attach(t, p.spec(t, "serve", fmt.Sprintf(":%d", guestPort)))
			},
			Again: func(t *testing.T, s engine.Spec, checkpoint string) engine.Spec {
				t.Helper()
				s.ID, s.Checkpoint = sandbox.NewID("testno"), checkpoint
				return wires.attach(t, s)
			},
			Put: func(t *testing.T, s engine.Spec, memory, file string) {
				t.Helper()
				wires[s.ID].ask(t, "keep "+memory)
				wires[s.ID].ask(t, "put /kept "+file)
			},
			Get: func(t *testing.T, s engine.Spec) (string, string) {
				t.Helper()
				return wires[s.ID].ask(t, "kept"), wires[s.ID].ask(t, "cat /kept")
			},
			Age: func(t *testing.T, checkpoint string) {
				t.Helper()
				path := filepath.Join(checkpoint, manifestFile)
				raw, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				raw = bytes.Replace(raw, []byte(moduleVersion()), []byte("v0.0.0"), 1)
				if err := os.WriteFile(path, raw, fileMode); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

// wires are those of the guests of one test.
type wires map[sandbox.ID]wire

// attach gives a guest a wire of its own.
func (ws wires) attach(t *testing.T, s engine.Spec) engine.Spec {
	t.Helper()
	ws[s.ID] = newWireAt(t, len(ws))
	s.NetNS = ws[s.ID].path
	return s
}

// left returns what is on the machine of the guests of p.
func (p place) left(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, dir := range []string{p.root, p.scratch, p.saves} {
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
