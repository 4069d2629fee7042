package gvisor

import (
	"os"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// plainLimits are those of the guests whose size does not matter.
func plainLimits() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 2000, MemoryBytes: 256 << 20, DiskBytes: 512 << 20}
}

// save saves a guest into a new directory.
func save(tb testing.TB, e *Engine, id sandbox.ID, spec engine.SaveSpec) (string, engine.Saved) {
	tb.Helper()
	if spec.Dir == "" {
		spec.Dir = tb.TempDir()
	}
	saved, err := e.Save(testContext(tb), id, spec)
	if err != nil {
		tb.Fatalf("save: %v", err)
	}
	return spec.Dir, saved
}

func TestSaveMemory(t *testing.T) {
	p := newPlace(t)
	e, s, w := serving(t, p, plainLimits())
	w.ask(t, "write /tmp/a 4194304")
	dir, saved := save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	entries, _ := os.ReadDir(dir)
	for _, x := range entries {
		st, _ := x.Info()
		t.Log(x.Name(), st.Size())
	}
	t.Logf("%+v", saved)
	if got := w.ask(t, "host"); got != "box-1" {
		t.Error(got)
	}
	if err := e.Stop(testContext(t), s.ID); err != nil {
		t.Fatal(err)
	}
	w2 := newWireAt(t, 1)
	r := p.spec(t, "ignored")
	r.NetNS, r.Checkpoint, r.Limits = w2.path, dir, s.Limits
	if err := e.Start(testContext(t), r); err != nil {
		t.Fatal(err)
	}
	if got := w2.ask(t, "host"); got != "box-1" {
		t.Error(got)
	}
	if got := w2.ask(t, "ls /tmp"); !strings.Contains(got, "a") {
		t.Error(got)
	}
}

func TestSaveFiles(t *testing.T) {
	p := newPlace(t)
	e, s, w := serving(t, p, plainLimits())
	w.ask(t, "write /tmp/a 4194304")
	dir, saved := save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveFiles})
	t.Logf("%+v", saved)
	if err := e.Stop(testContext(t), s.ID); err != nil {
		t.Fatal(err)
	}
	w2 := newWireAt(t, 1)
	r := s
	r.ID = sandbox.NewID("testno")
	r.NetNS, r.Checkpoint = w2.path, dir
	if err := e.Start(testContext(t), r); err != nil {
		t.Fatal(err)
	}
	if got := w2.ask(t, "ls /tmp"); !strings.Contains(got, "a") {
		t.Error(got)
	}
}
