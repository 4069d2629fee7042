// Package enginetest is the suite that every engine passes.
//
// It owns the meaning of engine.Engine, as tests; it knows no engine and imports none. Run uses one Machine per subtest,
// and subtests do not run in parallel, since an engine may use the real machine.
package enginetest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const patience = time.Minute

// Machine is where the engine under test keeps its guests. Each function may be called several times.
type Machine struct {
	// Open returns an engine over the machine. A second engine stands for a restarted process.
	Open func(t *testing.T) engine.Engine
	// Resting returns a spec with a fresh id, of a guest that runs until it is stopped.
	Resting func(t *testing.T) engine.Spec
	// Exiting returns a spec with a fresh id, of a guest whose first process exits with the code at once.
	Exiting func(t *testing.T, code int) engine.Spec
	// Broken returns a spec with a fresh id that passes Spec.Check and cannot start: ErrInvalid.
	Broken func(t *testing.T) engine.Spec
	// Holding returns a spec with a fresh id, of a guest that runs until it is stopped, and for which Put and Get work.
	Holding func(t *testing.T) engine.Spec
	// Again returns the spec of another guest like the one of spec, that starts from a checkpoint.
	Again func(t *testing.T, spec engine.Spec, checkpoint string) engine.Spec
	// Put has a guest hold two texts, one in its memory and one in a file of its root. Get returns what it holds.
	Put func(t *testing.T, spec engine.Spec, memory, file string)
	Get func(t *testing.T, spec engine.Spec) (memory, file string)
	// Age makes a checkpoint look as if another version of the engine had written it.
	Age func(t *testing.T, checkpoint string)
	// Left returns what is left on the machine of guests, such as processes and files, each by name.
	Left func(t *testing.T) []string
}

// Run checks an engine. The factory returns a fresh Machine that cleans up after itself.
func Run(t *testing.T, factory func(t *testing.T) Machine) {
	t.Helper()
	for _, c := range []struct {
		name string
		run  func(*testing.T, Machine)
	}{
		{"Caps", testCaps},
		{"Lifecycle", testLifecycle},
		{"ExitCode", testExitCode},
		{"WaitersShareOneExit", testWaiters},
		{"WaitEndsWithContext", testWaitContext},
		{"StopIsIdempotent", testStopTwice},
		{"DuplicateIsConflict", testDuplicate},
		{"UnknownIsNotFound", testUnknown},
		{"InvalidSpec", testInvalid},
		{"BrokenSpec", testBroken},
		{"EndedGuestRemainsUntilStopped", testRemains},
		{"RestartAdopts", testRestart},
		{"RestartFindsRemains", testRestartRemains},
		{"CancelledStartLeavesNothing", testCancel},
		{"ManyAtOnce", testMany},
		{"Stats", testStats},
		{"SaveMemory", testSaveMemory},
		{"SaveGenerations", testSaveGenerations},
		{"SaveFiles", testSaveFiles},
		{"SaveLayer", testSaveLayer},
		{"Hold", testHold},
		{"Stream", testStream},
		{"StreamBreaksOff", testStreamBreaksOff},
		{"SaveRefuses", testSaveRefuses},
		{"CheckpointRefused", testCheckpointRefused},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, factory(t)) })
	}
}

func testCaps(t *testing.T, m Machine) {
	t.Helper()
	known := map[string]bool{
		"disk_limit": true, "memory_limit": true, "cpu_limit": true, "cgroup_v1": true, "cgroup_v2": true, "kvm": true,
		"save_memory": true, "save_files": true, "save_layer": true,
	}
	caps := m.Open(t).Caps()
	if caps.Name == "" || caps.Version == "" {
		t.Errorf("got %+v, want a name and a version", caps)
	}
	for _, c := range caps.Capabilities {
		if !known[c] {
			t.Errorf("capability %q is not in the closed set", c)
		}
	}
}

func testLifecycle(t *testing.T, m Machine) {
	t.Helper()
	e, ctx, spec := m.Open(t), within(t), m.Resting(t)
	start(t, e, spec)
	wantList(t, e, map[sandbox.ID]bool{spec.ID: true})
	type result struct {
		exit engine.Exit
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		exit, err := e.Wait(ctx, spec.ID)
		ended <- result{exit, err}
	}()
	stop(t, e, spec.ID)
	// The waiter may have come too late to find the guest.
	if r := <-ended; r.err == nil && (r.exit.Code != -1 || r.exit.OOM || r.exit.Reason == "" || r.exit.At.IsZero()) {
		t.Errorf("stopped guest: got %+v, want code -1 with a reason and a time", r.exit)
	} else if r.err != nil && !errors.Is(r.err, sandbox.ErrNotFound) {
		t.Errorf("wait: %v", r.err)
	}
	wantNothing(t, m, e)
}

func testExitCode(t *testing.T, m Machine) {
	t.Helper()
	e := m.Open(t)
	for _, code := range []int{0, 1, 42} {
		spec := m.Exiting(t, code)
		start(t, e, spec)
		if exit := wait(t, e, spec.ID); exit.Code != code || exit.OOM || exit.Reason == "" || exit.At.IsZero() {
			t.Errorf("got %+v, want code %d with a reason and a time", exit, code)
		}
		stop(t, e, spec.ID)
	}
	wantNothing(t, m, e)
}

func testWaiters(t *testing.T, m Machine) {
	t.Helper()
	e, ctx, spec := m.Open(t), within(t), m.Exiting(t, 5)
	start(t, e, spec)
	const waiters = 4
	exits := make([]engine.Exit, waiters)
	var wg sync.WaitGroup
	for i := range exits {
		wg.Go(func() {
			var err error
			if exits[i], err = e.Wait(ctx, spec.ID); err != nil {
				t.Errorf("wait: %v", err)
			}
		})
	}
	wg.Wait()
	for _, x := range exits {
		if x != exits[0] || x.Code != 5 {
			t.Errorf("got %+v and %+v, want the same, with code 5", exits[0], x)
		}
	}
	stop(t, e, spec.ID)
}

func testWaitContext(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Resting(t)
	start(t, e, spec)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := e.Wait(ctx, spec.ID); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want that the deadline passed", err)
	}
	wantList(t, e, map[sandbox.ID]bool{spec.ID: true})
	stop(t, e, spec.ID)
}

func testStopTwice(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Resting(t)
	stop(t, e, spec.ID) // never there
	start(t, e, spec)
	stop(t, e, spec.ID)
	stop(t, e, spec.ID)
	start(t, e, spec) // the id is free again
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}

func testDuplicate(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Resting(t)
	start(t, e, spec)
	if err := e.Start(within(t), spec); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("second start: got %v, want ErrConflict", err)
	}
	wantList(t, e, map[sandbox.ID]bool{spec.ID: true})
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}

func testUnknown(t *testing.T, m Machine) {
	t.Helper()
	e, ctx, id := m.Open(t), within(t), m.Resting(t).ID
	if _, err := e.Wait(ctx, id); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("wait: got %v, want ErrNotFound", err)
	}
	if _, err := e.Stats(ctx, id); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("stats: got %v, want ErrNotFound", err)
	}
	wantList(t, e, nil)
}

func testInvalid(t *testing.T, m Machine) {
	t.Helper()
	e := m.Open(t)
	for name, change := range map[string]func(*engine.Spec){
		"id":     func(s *engine.Spec) { s.ID = "../escape" },
		"root":   func(s *engine.Spec) { s.RootFS = "relative" },
		"args":   func(s *engine.Spec) { s.Args = nil },
		"cpu":    func(s *engine.Spec) { s.Limits.MilliCPU = 0 },
		"memory": func(s *engine.Spec) { s.Limits.MemoryBytes = 1 },
		"disk":   func(s *engine.Spec) { s.Limits.DiskBytes = -1 },
	} {
		spec := m.Resting(t)
		change(&spec)
		if err := e.Start(within(t), spec); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	wantNothing(t, m, e)
}

func testBroken(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Broken(t)
	if err := e.Start(within(t), spec); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
	wantNothing(t, m, e)
	good := m.Resting(t)
	good.ID = spec.ID
	start(t, e, good)
	stop(t, e, good.ID)
}

func testRemains(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Exiting(t, 3)
	start(t, e, spec)
	first := wait(t, e, spec.ID)
	wantList(t, e, map[sandbox.ID]bool{spec.ID: false})
	if again := wait(t, e, spec.ID); again != first {
		t.Errorf("second wait: got %+v, want %+v", again, first)
	}
	if err := e.Start(within(t), spec); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("start over remains: got %v, want ErrConflict", err)
	}
	stop(t, e, spec.ID)
	if _, err := e.Wait(within(t), spec.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("wait after stop: got %v, want ErrNotFound", err)
	}
	wantNothing(t, m, e)
}

func testRestart(t *testing.T, m Machine) {
	t.Helper()
	before, spec := m.Open(t), m.Resting(t)
	start(t, before, spec)
	after := m.Open(t)
	wantList(t, after, map[sandbox.ID]bool{spec.ID: true})
	if err := after.Start(within(t), spec); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("start: got %v, want ErrConflict", err)
	}
	if _, err := after.Stats(within(t), spec.ID); err != nil {
		t.Errorf("stats: %v", err)
	}
	stop(t, after, spec.ID)
	wantNothing(t, m, after)
}

func testRestartRemains(t *testing.T, m Machine) {
	t.Helper()
	before, spec := m.Open(t), m.Exiting(t, 9)
	start(t, before, spec)
	wait(t, before, spec.ID)
	after := m.Open(t)
	wantList(t, after, map[sandbox.ID]bool{spec.ID: false})
	if exit := wait(t, after, spec.ID); exit.Reason == "" {
		t.Errorf("got %+v, want a reason", exit)
	}
	stop(t, after, spec.ID)
	wantNothing(t, m, after)
}

func testCancel(t *testing.T, m Machine) {
	t.Helper()
	e := m.Open(t)
	// Cancelled before, in the middle of, and perhaps after each step.
	for _, d := range []time.Duration{0, time.Millisecond, 3 * time.Millisecond, 8 * time.Millisecond, 20 * time.Millisecond} {
		spec := m.Resting(t)
		ctx, cancel := context.WithTimeout(t.Context(), d)
		err := e.Start(ctx, spec)
		cancel()
		switch {
		case err == nil:
			stop(t, e, spec.ID)
		case !errors.Is(err, context.DeadlineExceeded):
			t.Errorf("after %v: got %v, want that the deadline passed", d, err)
		}
		wantNothing(t, m, e)
	}
}

func testMany(t *testing.T, m Machine) {
	t.Helper()
	e, ctx := m.Open(t), within(t)
	want := map[sandbox.ID]bool{}
	var specs []engine.Spec
	for range 5 {
		s := m.Resting(t)
		specs, want[s.ID] = append(specs, s), true
	}
	each := func(f func(engine.Spec) error) {
		var wg sync.WaitGroup
		for _, s := range specs {
			wg.Go(func() {
				if err := f(s); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	each(func(s engine.Spec) error { return e.Start(ctx, s) })
	wantList(t, e, want)
	each(func(s engine.Spec) error { return e.Stop(ctx, s.ID) })
	wantNothing(t, m, e)
}

func testStats(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Resting(t)
	start(t, e, spec)
	s, err := e.Stats(within(t), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if s.Time.IsZero() || s.CPUTime < 0 || s.MemoryBytes <= 0 || s.CacheBytes < 0 || s.DiskBytes < 0 {
		t.Errorf("got %+v, want a time, some memory, and nothing negative", s)
	}
	stop(t, e, spec.ID)
}

// within returns a context that a hanging engine does not outlast.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, e engine.Engine, spec engine.Spec) {
	t.Helper()
	if err := e.Start(within(t), spec); err != nil {
		t.Fatalf("start: %v", err)
	}
}

func stop(t *testing.T, e engine.Engine, id sandbox.ID) {
	t.Helper()
	if err := e.Stop(within(t), id); err != nil {
		t.Fatalf("stop: %v", err)
	}
}

func wait(t *testing.T, e engine.Engine, id sandbox.ID) engine.Exit {
	t.Helper()
	exit, err := e.Wait(within(t), id)
	if err != nil {
		t.Fatalf("wait: %v", err)
	}
	return exit
}

// wantList compares the guests that exist, and whether they run.
func wantList(t *testing.T, e engine.Engine, want map[sandbox.ID]bool) {
	t.Helper()
	list, err := e.List(within(t))
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	for _, g := range list {
		running, known := want[g.ID]
		if !known || running != g.Running || (g.PID > 0) != g.Running {
			t.Errorf("list: got %+v, want %v", g, want)
		}
	}
	if len(list) != len(want) {
		t.Errorf("list: got %d guests, want %d", len(list), len(want))
	}
}

// wantNothing checks that no guest and nothing of one exists.
func wantNothing(t *testing.T, m Machine, e engine.Engine) {
	t.Helper()
	wantList(t, e, nil)
	for _, what := range m.Left(t) {
		t.Errorf("left on the machine: %s", what)
	}
}
