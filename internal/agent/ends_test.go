package agent

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestOwnEnd checks when the node itself acts on an end.
func TestOwnEnd(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := func(d time.Duration) time.Time { return now.Add(d) }
	idle := SandboxState{EndAt: at(-time.Hour), Idle: true, Timeout: time.Minute, UsedAt: at(-time.Second)}
	with := func(b SandboxState, change func(*SandboxState)) SandboxState { change(&b); return b }
	for name, c := range map[string]struct {
		box     SandboxState
		decided time.Time
		want    time.Duration
	}{
		"nobody decides":           {SandboxState{EndAt: at(time.Second)}, time.Time{}, time.Second},
		"nobody decides any more":  {SandboxState{EndAt: at(time.Second)}, at(-time.Second), time.Second},
		"a server decides":         {SandboxState{EndAt: at(time.Second)}, at(6 * time.Second), 6 * time.Second},
		"the server does nothing":  {SandboxState{EndAt: at(-10 * time.Second)}, at(6 * time.Second), 5 * time.Second},
		"at once":                  {SandboxState{EndAt: now, AtOnce: true}, at(6 * time.Second), 0},
		"idle, a server decides":   {idle, at(6 * time.Second), 6 * time.Second},
		"idle, used lately":        {idle, time.Time{}, 59 * time.Second},
		"idle, in use":             {with(idle, func(b *SandboxState) { b.Open, b.UsedAt = true, at(-time.Hour) }), time.Time{}, useRecheck},
		"idle for long":            {with(idle, func(b *SandboxState) { b.UsedAt = at(-time.Hour) }), time.Time{}, -59 * time.Minute},
		"idle, its end set beyond": {with(idle, func(b *SandboxState) { b.EndAt = at(time.Hour) }), time.Time{}, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			p := planner{state: &State{Decided: c.decided}, now: now}
			if got := p.ownEnd(&c.box).Sub(now); got != c.want {
				t.Errorf("acts after %s, want %s", got, c.want)
			}
		})
	}
}

// TestServerDecides has a server see to ends, fall silent, and see to them again.
func TestServerDecides(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.server.decide(6 * time.Second)
		n := m.boot()
		synctest.Wait()
		made := func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(10 * time.Second) }
		left, zero := n.create(made), n.create(made)
		pauses := n.create(made, func(r *agentv1.CreateRequest) { r.AutoPause = true })
		_, err := n.SetTimeout(t.Context(), &agentv1.SetTimeoutRequest{Id: string(zero), Timeout: durationpb.New(0)})
		m.check(err)
		synctest.Wait()
		if got := n.state(zero); got != "deleted: timeout" {
			t.Errorf("ended at once: %s", got)
		}
		pass(20 * time.Second)
		if got := n.state(left); got != "running" {
			t.Errorf("the server has not decided: %s", got)
		}
		_, err = n.Pause(t.Context(), &agentv1.PauseRequest{Id: string(pauses), TimedOut: true})
		m.check(err)
		if got := n.state(pauses); got != "paused: timeout" {
			t.Errorf("paused by the server: %s", got)
		}
		pass(6 * time.Second)
		if got := n.state(left); got != "deleted: timeout" {
			t.Errorf("the server has done nothing for long: %s", got)
		}
		last := n.create(made)
		m.server.decide(0)
		pass(10*time.Second + time.Millisecond)
		if got := n.state(last); got != "deleted: timeout" {
			t.Errorf("no server decides: %s", got)
		}
	})
}

// TestTimedOut checks what the change says of a kill that the server decided on, and that a stale one is refused.
func TestTimedOut(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Second) })
		got, err := n.Get(t.Context(), &agentv1.GetRequest{Id: string(id)})
		m.check(err)
		generation := got.GetSandbox().GetGeneration()
		req := &agentv1.KillRequest{Id: string(id), Reason: "idle for 1m0s", Generation: generation - 1, TimedOut: true}
		if _, err := n.Kill(t.Context(), req); err == nil {
			t.Error("a stale decision was carried out")
		}
		req.Generation = generation
		_, err = n.Kill(t.Context(), req)
		m.check(err)
		synctest.Wait()
		pass(time.Second)
		if got, types := n.state(id), m.server.types(id); got != "deleted: idle for 1m0s" || types != "created started timed_out" {
			t.Errorf("%s, reported %q", got, types)
		}
	})
}

// TestIdle has the node alone, without a server that decides, see to an end that moves with use.
func TestIdle(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) {
			r.Timeout, r.IdleTimeout, r.AutoPause = durationpb.New(time.Minute), true, true
		})
		c, err := n.DialLocal(t.Context(), id, 8080)
		m.check(err)
		pass(5 * time.Second)
		if busy := m.server.busy(); len(busy) != 1 || sandbox.ID(busy[0]) != id {
			t.Errorf("busy while somebody is connected: %v", busy)
		}
		pass(10 * time.Minute)
		m.check(c.Close())
		pass(59 * time.Second)
		if got, busy := n.state(id), m.server.busy(); got != "running" || len(busy) != 0 {
			t.Errorf("a minute from its last use: %s, busy %v", got, busy)
		}
		pass(2 * time.Second)
		if got := n.state(id); got != "paused: idle for 1m0s" {
			t.Errorf("after a minute: %s", got)
		}
	})
}
