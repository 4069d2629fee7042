package agent

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestPlan(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	after := func(d time.Duration) time.Time { return now.Add(d) }
	for name, c := range map[string]struct {
		box  SandboxState
		want string
		next time.Duration // 0 means never
	}{
		"runs for ever":     {SandboxState{State: sandbox.StateRunning}, "", 0},
		"runs on":           {SandboxState{State: sandbox.StateRunning, EndAt: after(5)}, "", 5},
		"is over":           {SandboxState{State: sandbox.StateRunning, EndAt: now}, "expire", 0},
		"is over and busy":  {SandboxState{State: sandbox.StateRunning, EndAt: now, Busy: true}, "", 0},
		"is to be paused":   {SandboxState{State: sandbox.StateRunning, EndAt: now, AutoPause: true}, "pause", 0},
		"is paused later":   {SandboxState{State: sandbox.StateRunning, EndAt: now, AutoPause: true, RetryAt: after(3)}, "", 3},
		"pauses in time":    {SandboxState{State: sandbox.StateRunning, EndAt: after(4), AutoPause: true}, "", 4},
		"is paused":         {SandboxState{State: sandbox.StatePaused, EndAt: now}, "", 0},
		"left something":    {SandboxState{State: sandbox.StatePaused, Left: true}, "retry", 0},
		"is being paused":   {SandboxState{State: sandbox.StatePausing, Busy: true}, "", 0},
		"stays pausing":     {SandboxState{State: sandbox.StatePausing}, "retry", 0},
		"stays resuming":    {SandboxState{State: sandbox.StateResuming, RetryAt: after(2)}, "", 2},
		"is a build's":      {SandboxState{State: sandbox.StateCreating, Build: true}, "", 0},
		"is warm":           {SandboxState{State: sandbox.StateCreating, Warm: true, Ready: true}, "", 0},
		"is half warm":      {SandboxState{State: sandbox.StateCreating, Warm: true}, "retry", 0},
		"is half made":      {SandboxState{State: sandbox.StateCreating}, "retry", 0},
		"was claimed":       {SandboxState{State: sandbox.StateCreating, Ready: true}, "retry", 0},
		"is being made":     {SandboxState{State: sandbox.StateCreating, Busy: true}, "", 0},
		"is to be ended":    {SandboxState{State: sandbox.StateStopping}, "retry", 0},
		"is ended later":    {SandboxState{State: sandbox.StateStopping, RetryAt: after(7)}, "", 7},
		"ended lately":      {SandboxState{State: sandbox.StateDeleted, EndedAt: after(-3)}, "", 7},
		"ended":             {SandboxState{State: sandbox.StateFailed, EndedAt: after(-10)}, "forget", 0},
		"ended, unreported": {SandboxState{State: sandbox.StateLost, EndedAt: after(-10), Sequence: 6}, "", 0},
	} {
		s := &State{Sandboxes: []SandboxState{c.box}, Acknowledged: 5, Retention: 10}
		actions, next := Plan(s, now)
		var kinds []string
		for _, a := range actions {
			kinds = append(kinds, string(a.Kind))
		}
		got := strings.Join(kinds, " ")
		want := time.Time{}
		if c.next > 0 {
			want = after(c.next)
		}
		if got != c.want || !next.Equal(want) {
			t.Errorf("one that %s: %q, next %v; want %q, %v", name, got, next, c.want, want)
		}
	}
}

func TestPlanOfImages(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	actions, next := Plan(&State{Garbage: []GarbageState{
		{Digest: "free"}, {Digest: "used", Used: true}, {Digest: "failed", RetryAt: now.Add(5)},
	}}, now)
	if diff := cmp.Diff([]Action{{Kind: ActionFreeImage, Image: "free"}}, actions, cmp.AllowUnexported(poolKey{})); diff != "" || !next.Equal(now.Add(5)) {
		t.Errorf("next %v, actions (-want +got):\n%s", next, diff)
	}
}

func TestPlanOfPools(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	base := func() *State {
		return &State{
			Room: times(small(), 100), MaxFilling: 10, WarmMin: 2, WarmMax: 8, WarmKeep: time.Hour, WarmIdle: time.Minute,
			Pools: []PoolState{{Key: poolKey{digest: "d", size: small()}, Use: usage{last: now.Add(-time.Second), weight: 4}}},
		}
	}
	ready := func(n int) (ids []sandbox.ID) {
		for i := range n {
			ids = append(ids, sandbox.ID(fmt.Sprint("w", i)))
		}
		return ids
	}
	for name, c := range map[string]struct {
		change func(s *State, p *PoolState)
		want   string
	}{
		"empty":               {func(*State, *PoolState) {}, "4 fill"},
		"idle":                {func(_ *State, p *PoolState) { p.Use.last = now.Add(-time.Hour / 2) }, "2 fill"},
		"in great demand":     {func(_ *State, p *PoolState) { p.Use.weight = 100 }, "8 fill"},
		"partly there":        {func(_ *State, p *PoolState) { p.Ready, p.Filling = ready(1), 2 }, "1 fill"},
		"full":                {func(_ *State, p *PoolState) { p.Ready = ready(4) }, ""},
		"creates wait":        {func(s *State, _ *PoolState) { s.Waiting = 1 }, ""},
		"fillers busy":        {func(s *State, _ *PoolState) { s.Filling, s.MaxFilling = 9, 10 }, "1 fill"},
		"failed lately":       {func(_ *State, p *PoolState) { p.RetryAt = now.Add(1) }, ""},
		"little room":         {func(s *State, _ *PoolState) { s.Room = times(small(), 3) }, "3 fill"},
		"just used, half":     {func(_ *State, p *PoolState) { p.Use.last, p.Ready = now, ready(2) }, ""},
		"just used, low":      {func(_ *State, p *PoolState) { p.Use.last, p.Ready = now, ready(1) }, "3 fill"},
		"too many, in use":    {func(_ *State, p *PoolState) { p.Ready = ready(6) }, ""},
		"too many, idle":      {func(_ *State, p *PoolState) { p.Use.last, p.Ready = now.Add(-2*time.Minute), ready(6) }, "4 give_back"},
		"pressure":            {func(s *State, p *PoolState) { s.Pressure, p.Ready = true, ready(3) }, "3 give_back"},
		"newer image":         {func(_ *State, p *PoolState) { p.Stale, p.Ready = true, ready(3) }, "3 give_back"},
		"newer image, making": {func(_ *State, p *PoolState) { p.Stale, p.Filling = true, 1 }, ""},
		"newer image, empty":  {func(_ *State, p *PoolState) { p.Stale = true }, "1 close_pool"},
		"long unused":         {func(_ *State, p *PoolState) { p.Use.last, p.Ready = now.Add(-2*time.Hour), ready(2) }, "2 give_back"},
		"switched off":        {func(s *State, _ *PoolState) { s.WarmMin, s.WarmMax = 0, 0 }, "1 close_pool"},
	} {
		s := base()
		c.change(s, &s.Pools[0])
		actions, next := Plan(s, now)
		count := map[ActionKind]int{}
		for _, a := range actions {
			count[a.Kind]++
		}
		var counts []string
		for k, n := range count {
			counts = append(counts, fmt.Sprint(n, " ", k))
		}
		got := strings.Join(counts, " ")
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if next.IsZero() || next.Before(now) || next.After(now.Add(planEvery)) {
			t.Errorf("%s: next at %v", name, next.Sub(now))
		}
	}
}

// TestPlanHistories plays random histories on a model and checks after each step that nothing is overdue, that nobody
// who is busy is touched, that room and bounds are kept, and that the plan comes to rest.
func TestPlanHistories(t *testing.T) {
	for seed := range uint64(200) {
		h := newHistory(seed)
		for range 60 {
			h.step()
			if msg := h.check(); msg != "" {
				t.Fatalf("seed %d: %s\n%s", seed, msg, cmp.Diff(State{}, *h.s))
			}
		}
	}
}

type history struct {
	rng  *rand.Rand
	s    *State
	now  time.Time
	next int
}

func newHistory(seed uint64) *history {
	h := &history{rng: rand.New(rand.NewPCG(seed, 7)), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	h.s = &State{
		Room: times(small(), 20), MaxFilling: 1 + h.rng.IntN(3), WarmMin: h.rng.IntN(3), WarmMax: 3 + h.rng.IntN(4),
		WarmKeep: time.Hour, WarmIdle: time.Minute, Retention: 10 * time.Minute,
	}
	for i := range 2 {
		h.s.Pools = append(h.s.Pools, PoolState{Custom: i%2 == 1, Key: poolKey{digest: fmt.Sprint("d", i), size: small()}, Use: usage{last: h.now}})
	}
	return h
}

func (h *history) add(b SandboxState) sandbox.ID {
	h.next++
	b.ID = sandbox.ID(fmt.Sprint("s", h.next))
	h.s.Sandboxes = append(h.s.Sandboxes, b)
	h.s.Room = h.s.Room.Sub(small())
	return b.ID
}

// step lets something happen.
func (h *history) step() {
	s := h.s
	h.now = h.now.Add(time.Duration(h.rng.Int64N(int64(3 * time.Minute))))
	switch h.rng.IntN(7) {
	case 0:
		if small().Fits(s.Room) {
			h.add(SandboxState{State: sandbox.StateRunning, EndAt: h.now.Add(time.Duration(h.rng.Int64N(int64(10 * time.Minute))))})
		}
	case 1:
		p := &s.Pools[h.rng.IntN(len(s.Pools))]
		p.Use = p.Use.add(h.now)
	case 2:
		s.Pressure = !s.Pressure
	case 3:
		s.Waiting = h.rng.IntN(2)
	case 4:
		p := &s.Pools[h.rng.IntN(len(s.Pools))]
		p.Stale = !p.Stale
	case 5:
		s.Acknowledged += h.rng.Int64N(3)
	case 6:
		if len(s.Sandboxes) > 0 {
			b := &s.Sandboxes[h.rng.IntN(len(s.Sandboxes))]
			b.Busy = !b.Busy
		}
	}
}

// check plans and carries out until nothing is left to do.
func (h *history) check() string {
	for round := 0; ; round++ {
		actions, next := Plan(h.s, h.now)
		if !next.IsZero() && !next.After(h.now) {
			return "the next look is not in the future"
		}
		actions = slices.DeleteFunc(actions, func(a Action) bool { return a.Kind == ActionClosePool })
		if len(actions) == 0 {
			return h.overdue()
		}
		if round > 10 {
			return fmt.Sprintf("no rest: %v", actions)
		}
		for _, a := range actions {
			if msg := h.carryOut(a); msg != "" {
				return fmt.Sprintf("%v: %s", a, msg)
			}
		}
	}
}

func (h *history) overdue() string {
	for _, b := range h.s.Sandboxes {
		if !b.Busy && b.State == sandbox.StateRunning && !b.EndAt.IsZero() && !b.EndAt.After(h.now) {
			return fmt.Sprintf("%s is over and nothing is planned", b.ID)
		}
	}
	for _, p := range h.s.Pools {
		if (h.s.Pressure || p.Stale) && len(p.Ready) > 0 {
			return fmt.Sprintf("pool %s keeps %d", p.Key.digest, len(p.Ready))
		}
	}
	return ""
}

func (h *history) carryOut(a Action) string {
	s := h.s
	if a.Kind == ActionFill {
		i := slices.IndexFunc(s.Pools, func(p PoolState) bool { return p.Key == a.Pool })
		p := &s.Pools[i]
		switch {
		case s.Waiting > 0 || s.Pressure || p.Stale:
			return "fills at the wrong time"
		case !small().Fits(s.Room):
			return "fills without room"
		case len(p.Ready) >= s.WarmMax:
			return "fills beyond the bound"
		}
		p.Ready = append(p.Ready, h.add(SandboxState{State: sandbox.StateCreating, Warm: true, Ready: true}))
		return ""
	}
	i := slices.IndexFunc(s.Sandboxes, func(b SandboxState) bool { return b.ID == a.ID })
	b := &s.Sandboxes[i]
	switch {
	case a.Kind == ActionGiveBack:
		for k := range s.Pools {
			s.Pools[k].Ready = slices.DeleteFunc(s.Pools[k].Ready, func(id sandbox.ID) bool { return id == a.ID })
		}
		s.Sandboxes = slices.Delete(s.Sandboxes, i, i+1)
		s.Room = s.Room.Add(small())
	case b.Busy:
		return "touches what somebody works on"
	case a.Kind == ActionExpire && b.EndAt.After(h.now):
		return "ends too early"
	case a.Kind == ActionExpire:
		b.State, b.EndedAt, b.Sequence = sandbox.StateDeleted, h.now, h.s.Acknowledged+h.rng.Int64N(2)
		s.Room = s.Room.Add(small())
	case a.Kind == ActionForget && b.Sequence > s.Acknowledged:
		return "forgets what the server does not know"
	case a.Kind == ActionForget:
		s.Sandboxes = slices.Delete(s.Sandboxes, i, i+1)
	default:
		return "not expected here"
	}
	return ""
}

func BenchmarkPlan(b *testing.B) {
	now := time.Now()
	s := &State{Retention: time.Minute, Pools: []PoolState{{Key: poolKey{digest: "d", size: small()}, Use: usage{last: now}}}}
	for i := range 1000 {
		s.Sandboxes = append(s.Sandboxes, SandboxState{ID: sandbox.ID(strconv.Itoa(i)), State: sandbox.StateRunning, EndAt: now.Add(time.Hour)})
	}
	for b.Loop() {
		Plan(s, now)
	}
}

func TestPressed(t *testing.T) {
	for _, c := range []struct {
		psi, info string
		want      bool
	}{
		{"", "", false},
		{"some avg10=0.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00", "MemTotal: 1000 kB\nMemAvailable:    500 kB\n", false},
		{"some avg10=12.00 avg60=0.00 avg300=0.00 total=1\n", "", true},
		{"", "MemTotal: 1000 kB\nMemAvailable:    49 kB\n", true},
		{"some avg10=x\n", "MemTotal: x kB\n", false},
	} {
		if got := pressed([]byte(c.psi), []byte(c.info)); got != c.want {
			t.Errorf("pressed(%q, %q) = %v", c.psi, c.info, got)
		}
	}
	MemoryPressure()
}
