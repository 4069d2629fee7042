package gvisor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// stands reports whether a guest stands still, by the processor time that it uses while somebody waits.
func stands(t *testing.T, e *Engine, id sandbox.ID) bool {
	t.Helper()
	cpu := func() time.Duration {
		s, err := e.Stats(testContext(t), id)
		if err != nil {
			t.Fatal(err)
		}
		return s.CPUTime
	}
	before := cpu()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	<-ctx.Done()
	return cpu()-before < 10*time.Millisecond
}

func TestHold(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	w.ask(t, "tick /tmp/ticks")
	for _, kind := range []engine.SaveKind{engine.SaveMemory, engine.SaveFiles, engine.SaveLayer} {
		dir, _ := p.save(t, e, s.ID, engine.SaveSpec{Kind: kind, Hold: true})
		if !stands(t, e, s.ID) {
			t.Errorf("%s: the guest goes on", kind)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := e.Wait(ctx, s.ID); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: wait: %v", kind, err)
		}
		cancel()
		if kind == engine.SaveMemory { // what was saved runs
			_, w := p.again(t, e, s, dir, 1)
			before := w.ask(t, "sum /tmp/ticks")
			await(t, "the copy goes on", func() bool { return w.ask(t, "sum /tmp/ticks") != before })
		}
		other := p.open(t) // as after a restart
		for range 2 {      // the second finds nothing to do
			if err := other.Thaw(testContext(t), s.ID); err != nil {
				t.Fatal(err)
			}
		}
		if got := w.ask(t, "host"); got != "box-1" {
			t.Errorf("%s: after thaw: %s", kind, got)
		}
		if stands(t, e, s.ID) {
			t.Errorf("%s: the guest still stands", kind)
		}
	}
	p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
	p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true}) // of one that stands
	p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	if got := w.ask(t, "host"); got != "box-1" {
		t.Errorf("after a save without hold: %s", got)
	}
	p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
	if err := e.Stop(testContext(t), s.ID); err != nil {
		t.Fatal(err)
	}
}

// TestUnsure checks that a guest is found standing or running where a killed process left no word of it.
func TestUnsure(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	g, err := e.find(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.note(standsUnsure); err != nil {
		t.Fatal(err)
	}
	if still, err := e.settle(testContext(t), g); err != nil || still {
		t.Fatalf("a running guest: got %t, %v", still, err)
	}
	if got := w.ask(t, "host"); got != "box-1" {
		t.Error(got)
	}
	if err := e.freeze(testContext(t), g); err != nil {
		t.Fatal(err)
	}
	if err := g.note(standsUnsure); err != nil {
		t.Fatal(err)
	}
	if still, err := e.settle(testContext(t), g); err != nil || !still {
		t.Fatalf("a standing guest: got %t, %v", still, err)
	}
	if err := g.note(standsUnsure); err != nil {
		t.Fatal(err)
	}
	if err := p.open(t).Thaw(testContext(t), s.ID); err != nil {
		t.Fatal(err)
	}
	if got := w.ask(t, "host"); got != "box-1" {
		t.Error(got)
	}
}

// TestSaveKilled kills the process that saves, at several moments. The guest must not end, and go on when told to.
func TestSaveKilled(t *testing.T) {
	disks(t, func(t *testing.T, p place, _ bool) {
		t.Helper()
		e := p.open(t)
		s, w := p.servingIn(t, e, 0)
		w.ask(t, "write /tmp/a 33554432")
		w.ask(t, "alloc 33554432")
		w.ask(t, "tick /tmp/ticks")
		for i, kind := range []engine.SaveKind{engine.SaveMemory, engine.SaveFiles, engine.SaveLayer, engine.SaveMemory} {
			for n := range 3 * *times {
				after := 10*time.Millisecond + rand.N(100*time.Millisecond)
				dir := filepath.Join(p.saves, fmt.Sprintf("%d-%d", i, n))
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				helpElsewhere(t, p, help{Save: &engine.SaveSpec{Kind: kind, Dir: dir, Hold: i%2 == 0}, ID: s.ID}, after)
				if err := p.open(t).Thaw(testContext(t), s.ID); err != nil {
					t.Fatalf("%s killed after %v: %v", kind, after, err)
				}
				before := w.ask(t, "sum /tmp/ticks")
				await(t, "the guest goes on", func() bool { return w.ask(t, "sum /tmp/ticks") != before })
			}
		}
		dir, _ := p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
		_, w2 := p.again(t, e, s, dir, 1)
		if got := w2.ask(t, "sum /tmp/a"); got != w.ask(t, "sum /tmp/a") {
			t.Errorf("got %s", got)
		}
	})
}

// TestSaveFails checks that a guest goes on after a save that could not be written.
func TestSaveFails(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	w.ask(t, "alloc 67108864")
	small := t.TempDir()
	if err := unix.Mount("none", small, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // detached: the sentry has files in it open until its garbage collector comes by
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for i, hold := range []bool{false, true} {
		dir := filepath.Join(small, strconv.Itoa(i))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		_, err := e.Save(testContext(t), s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: dir, Hold: hold})
		if !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), "no space") {
			t.Errorf("full disk: got %v, want ErrUnavailable", err)
		}
		if got := w.ask(t, "host"); got != "box-1" {
			t.Error(got)
		}
		if err := e.Start(testContext(t), engine.Spec{
			ID: sandbox.NewID("testno"), RootFS: s.RootFS, ScratchDir: s.ScratchDir, Limits: s.Limits, Checkpoint: dir,
		}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("start from what is worthless: got %v, want ErrInvalid", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	dir := t.TempDir()
	if _, err := e.Save(ctx, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: dir, Hold: true}); err == nil {
		t.Error("a save that was cancelled: no error")
	}
	if got := w.ask(t, "host"); got != "box-1" {
		t.Error(got)
	}
}
