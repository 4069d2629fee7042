package gvisor

import (
	"fmt"
	"os"
	"testing"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// plainLimits are those of the guests whose size does not matter.
func plainLimits() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 2000, MemoryBytes: 256 << 20, DiskBytes: 512 << 20}
}

// save saves a guest into a new directory.
func (p place) save(tb testing.TB, e *Engine, id sandbox.ID, spec engine.SaveSpec) (string, engine.Saved) {
	tb.Helper()
	dir, err := os.MkdirTemp(p.saves, "") //nolint:usetesting // on the file system under test
	if err != nil {
		tb.Fatal(err)
	}
	spec.Dir = dir
	saved, err := e.Save(testContext(tb), id, spec)
	if err != nil {
		tb.Fatalf("save: %v", err)
	}
	return dir, saved
}

// servingIn starts a guest of p that answers commands over the n-th wire.
func (p place) servingIn(tb testing.TB, e *Engine, n int) (engine.Spec, wire) {
	tb.Helper()
	w := newWireAt(tb, n)
	s := p.spec(tb, "serve", fmt.Sprintf(":%d", guestPort))
	s.NetNS, s.Hostname, s.Limits = w.path, "box-1", plainLimits()
	if err := e.Start(testContext(tb), s); err != nil {
		tb.Fatal(err)
	}
	return s, w
}

// again starts a guest from a checkpoint of one like s, on the n-th wire.
func (p place) again(tb testing.TB, e *Engine, s engine.Spec, dir string, n int) (engine.Spec, wire) {
	tb.Helper()
	w := newWireAt(tb, n)
	s.ID, s.NetNS, s.Checkpoint = sandbox.NewID("testno"), w.path, dir
	if err := e.Start(testContext(tb), s); err != nil {
		tb.Fatalf("start from %s: %v", dir, err)
	}
	return s, w
}

// disks runs a test on a file system of each kind: one that can share blocks, and the usual one.
func disks(t *testing.T, f func(t *testing.T, p place, sharing bool)) {
	t.Helper()
	t.Run("copied", func(t *testing.T) { f(t, newPlace(t), false) })
	t.Run("shared", func(t *testing.T) { f(t, newPlaceIn(t, sharingDisk(t, 1<<30)), true) })
}

func TestSaveKeepsWhatThereWas(t *testing.T) {
	disks(t, func(t *testing.T, p place, sharing bool) {
		t.Helper()
		for _, kind := range []engine.SaveKind{engine.SaveMemory, engine.SaveFiles} {
			t.Run(string(kind), func(t *testing.T) {
				const size = 16 << 20
				e := p.open(t)
				s, w := p.servingIn(t, e, 0)
				w.ask(t, fmt.Sprintf("write /tmp/a %d", size))
				dir, saved := p.save(t, e, s.ID, engine.SaveSpec{Kind: kind})
				t.Logf("%+v", saved)
				if sharing && (saved.SharedBytes < size || saved.Bytes > size) || !sharing && (saved.SharedBytes != 0 || saved.Bytes < size) {
					t.Errorf("sharing is %t: got %+v", sharing, saved)
				}
				sum := w.ask(t, "sum /tmp/a")
				w.ask(t, "write /tmp/a 4096") // later than the save
				if err := e.Stop(testContext(t), s.ID); err != nil {
					t.Fatal(err)
				}
				for n := 1; n < 3; n++ {
					r, w := p.again(t, e, s, dir, n)
					if got := w.ask(t, "sum /tmp/a"); got != sum {
						t.Errorf("guest %d: got %s, want %s", n, got, sum)
					}
					st, err := e.Stats(testContext(t), r.ID)
					if err != nil || st.DiskBytes < size || st.MemoryBytes <= 0 || st.MemoryBytes > 64<<20 {
						t.Errorf("got %+v, %v", st, err)
					}
					w.ask(t, "write /tmp/a 8192")
				}
			})
		}
	})
}
