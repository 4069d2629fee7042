package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// world is nodes and proxies as they are; what the loop may know of them can be behind.
type world struct {
	tb testing.TB

	mu    sync.Mutex
	truth map[sandbox.ID]*sandbox.Sandbox
	// known is what the leading server's index says.
	known map[sandbox.ID]sandbox.Sandbox
	use   map[sandbox.ID]Activity
	// deaf are nodes that the present leader has not heard of.
	deaf  map[sandbox.NodeID]bool
	down  map[sandbox.NodeID]bool
	ended map[sandbox.ID]int
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	return &world{
		tb: tb, truth: map[sandbox.ID]*sandbox.Sandbox{}, known: map[sandbox.ID]sandbox.Sandbox{}, use: map[sandbox.ID]Activity{},
		deaf: map[sandbox.NodeID]bool{}, down: map[sandbox.NodeID]bool{}, ended: map[sandbox.ID]int{},
	}
}

func (w *world) Item(id sandbox.ID) (Item, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, ok := w.known[id]
	return Item{Sandbox: s, Activity: w.use[id], Known: !w.deaf[s.NodeID]}, ok
}

func (w *world) Kill(_ context.Context, v Verdict) error  { return w.act(v, false) }
func (w *world) Pause(_ context.Context, v Verdict) error { return w.act(v, true) }

// act is the owning node: it refuses what is stale, and says what should never have been decided.
func (w *world) act(v Verdict, pause bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	id, generation := v.ID, v.Generation
	s := w.truth[id]
	switch {
	case s == nil:
		return sandbox.NotFoundf("sandbox %s", id)
	case w.down[s.NodeID]:
		return sandbox.Unavailablef("node %s", s.NodeID)
	case s.Generation != generation:
		w.known[id] = *s // the refusal brings the news
		return sandbox.Conflictf("sandbox %s has generation %d, not %d", id, s.Generation, generation)
	}
	now, a := time.Now(), w.use[id]
	switch {
	case s.State != sandbox.StateRunning:
		w.tb.Errorf("%s: a second decision in state %s", id, s.State)
	case now.Before(End(s, a)):
		w.tb.Errorf("%s: ended %s early", id, End(s, a).Sub(now))
	case s.IdleTimeout && (a.Open > 0 || v.Forced):
		w.tb.Errorf("%s: ended in use", id)
	case pause != s.AutoPause:
		w.tb.Errorf("%s: pause is %t, want %t", id, pause, s.AutoPause)
	}
	s.Generation++
	s.State = sandbox.StateDeleted
	if pause {
		s.State = sandbox.StatePaused
	}
	w.known[id] = *s
	w.ended[id]++
	return nil
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// Random histories: nothing ends early or in use, nothing twice, and everything in the end.
func TestRandomHistories(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { history(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func history(t *testing.T, r *rand.Rand) {
	t.Helper()
	w := newWorld(t)
	loop := New(Config{Cluster: w, Log: quiet(), AtOnce: 8})
	lead := func() (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); loop.Lead(ctx) }()
		return func() { cancel(); <-done }
	}
	stop := lead()
	const boxes = 50
	for i := range boxes {
		w.create(loop, sandbox.ID(fmt.Sprintf("s%d", i)), r)
	}
	for range 300 {
		<-time.After(time.Duration(r.IntN(3000)) * time.Millisecond)
		if r.IntN(20) == 0 { // a change of leader: a new loop that has to learn everything
			stop()
			loop = New(Config{Cluster: w, Log: quiet(), AtOnce: 8})
			w.relearn(loop, r)
			stop = lead()
		}
		w.happen(loop, r)
	}
	w.calm(loop)
	<-time.After(time.Hour)
	stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, s := range w.truth {
		if s.State == sandbox.StateRunning && !s.EndAt.IsZero() {
			t.Errorf("%s: its time came at %s and nothing happened; use %+v", id, End(s, w.use[id]), w.use[id])
		}
	}
	if len(w.ended) == 0 {
		t.Error("nothing ended")
	}
}

func (w *world) create(l *Loop, id sandbox.ID, r *rand.Rand) {
	w.mu.Lock()
	defer w.mu.Unlock()
	timeout := time.Duration(1+r.IntN(300)) * time.Second
	s := sandbox.Sandbox{
		ID: id, NodeID: sandbox.NodeID(fmt.Sprintf("n%d", r.IntN(4))), State: sandbox.StateRunning, Generation: 1,
		EndAt: time.Now().Add(timeout), Timeout: timeout, AutoPause: r.IntN(2) == 0, IdleTimeout: r.IntN(2) == 0,
	}
	w.truth[id], w.known[id], w.use[id] = &s, s, Activity{Complete: true}
	l.Observe(&s)
}

// happen lets one thing happen.
func (w *world) happen(l *Loop, r *rand.Rand) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := sandbox.ID(fmt.Sprintf("s%d", r.IntN(50)))
	s, a := w.truth[id], w.use[id]
	switch r.IntN(8) {
	case 0, 1:
		a.Open++
	case 2, 3:
		a.Open, a.Last = max(0, a.Open-1), time.Now()
	case 4: // somebody sets the timeout; the server may learn it later
		if s.State == sandbox.StateRunning {
			s.Generation++
			s.EndAt = time.Now().Add(time.Duration(r.IntN(300)) * time.Second)
			if r.IntN(2) == 0 {
				w.known[id] = *s
				l.Observe(s)
			}
		}
	case 5:
		a.Complete = !a.Complete
	case 6:
		w.down[s.NodeID] = !w.down[s.NodeID]
	case 7: // it is resumed
		if s.State == sandbox.StatePaused {
			s.State = sandbox.StateRunning
			s.Generation++
			s.EndAt = time.Now().Add(s.Timeout)
			w.known[id] = *s
			l.Observe(s)
		}
	}
	w.use[id] = a
}

// relearn is what a new leader hears: nodes report one after the other.
func (w *world) relearn(l *Loop, r *rand.Rand) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := range 4 {
		w.deaf[sandbox.NodeID(fmt.Sprintf("n%d", n))] = r.IntN(2) == 0
	}
	for id, s := range w.truth {
		w.known[id] = *s
		l.Observe(s)
	}
}

// calm ends all use, and has everything known.
func (w *world) calm(l *Loop) {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.down)
	clear(w.deaf)
	for id, s := range w.truth {
		w.use[id] = Activity{Last: w.use[id].Last, Complete: true}
		w.known[id] = *s
		l.Observe(s)
	}
}

// What cannot be carried out is tried again, further and further apart.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		loop := New(Config{Cluster: w, Log: quiet()})
		w.down["n"] = true
		s := sandbox.Sandbox{ID: "a", NodeID: "n", State: sandbox.StateRunning, Generation: 1, EndAt: time.Now().Add(time.Second)}
		w.truth["a"], w.known["a"] = &s, s
		loop.Observe(&s)
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Minute, errors.New("over"))
		defer cancel()
		time.AfterFunc(5*time.Minute, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.down["n"] = false
		})
		loop.Lead(ctx)
		if failed := loop.Stats().Failed.Load(); failed < 10 || failed > 30 || w.ended["a"] != 1 {
			t.Errorf("failed %d times, ended %d times: want 10 to 30, and once", failed, w.ended["a"])
		}
	})
}

// What waits for a time by a clock that was set since is looked at anew.
func TestClockSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		loop := New(Config{Cluster: w, Log: quiet()})
		read, set := loop.read, time.Duration(0)
		loop.read = func() (time.Time, time.Duration) {
			wall, mono := read()
			return wall.Add(set), mono
		}
		s := sandbox.Sandbox{ID: "a", NodeID: "n", State: sandbox.StateRunning, Generation: 1, EndAt: time.Now().Add(time.Minute)}
		w.truth["a"], w.known["a"] = &s, s
		loop.queue.set("a", time.Now().Add(time.Hour)) // as before the clock was set back by an hour
		set = -time.Hour
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		loop.Lead(ctx)
		if w.ended["a"] != 1 {
			t.Errorf("ended %d times, want once", w.ended["a"])
		}
	})
}

// Ten thousand ends in one second are all carried out, and what is late is not later than it has to be.
func TestManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 10_000
		w := newWorld(t)
		loop := New(Config{Cluster: w, Log: quiet()})
		for i := range many {
			id := sandbox.ID(fmt.Sprintf("s%d", i))
			s := sandbox.Sandbox{
				ID: id, NodeID: sandbox.NodeID(fmt.Sprintf("n%d", i%100)), State: sandbox.StateRunning, Generation: 1, EndAt: time.Now().Add(time.Minute),
			}
			w.truth[id], w.known[id] = &s, s
			loop.Observe(&s)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		loop.Lead(ctx)
		if got := loop.Stats().Killed.Load(); got != many || loop.Waiting() != 0 {
			t.Errorf("%d of %d ended, %d wait", got, many, loop.Waiting())
		}
	})
}

func BenchmarkObserve(b *testing.B) {
	loop := New(Config{Cluster: newWorld(b), Log: quiet()})
	s := sandbox.Sandbox{State: sandbox.StateRunning}
	ids := make([]sandbox.ID, 100_000)
	for i := range ids {
		ids[i] = sandbox.ID(fmt.Sprintf("s%d", i))
	}
	now := time.Now()
	for i := 0; b.Loop(); i++ {
		s.ID, s.EndAt = ids[i%len(ids)], now.Add(time.Duration(i)*time.Millisecond)
		loop.Observe(&s)
	}
}
