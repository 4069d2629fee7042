package agent

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestClockStep(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := clock{wall: start}
	for _, at := range []struct{ wall, mono, want time.Duration }{
		{time.Minute, time.Minute, 0},
		{2*time.Minute + time.Second, 2 * time.Minute, 0}, // slewed
		{time.Hour + 3*time.Minute + time.Second, 3 * time.Minute, time.Hour},
		{time.Hour + 4*time.Minute, 4 * time.Minute, 0},
		{5 * time.Minute, 5 * time.Minute, -time.Hour},
	} {
		if got := c.step(start.Add(at.wall), at.mono); got.Round(2*time.Second) != at.want {
			t.Errorf("wall %v, monotonic %v: step %v, want %v", at.wall, at.mono, got, at.want)
		}
	}
}

// set makes the node's clock look as if it were set: the bubble's clocks cannot be set apart.
func (n *node) set(by time.Duration) {
	n.clock.turn <- struct{}{}
	read := n.clock.read
	n.clock.read = func() (time.Time, time.Duration) {
		wall, mono := read()
		return wall.Add(by), mono
	}
	<-n.clock.turn
	n.poke()
	synctest.Wait()
}

// TestClockSet moves the ends of sandboxes with the clock, so that none lives shorter or longer for it.
func TestClockSet(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		brief := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		forever := n.create(func(r *agentv1.CreateRequest) { r.Timeout = nil })
		in, _ := n.get(brief)
		end := in.record().EndAt
		n.set(time.Hour)
		if got := in.record().EndAt; !got.Equal(end.Add(time.Hour)) {
			t.Errorf("the end moved from %v to %v, want an hour later", end, got)
		}
		n.set(-time.Hour)
		pass(2 * time.Minute)
		if got := n.state(brief); got != "deleted: timeout" {
			t.Errorf("after its time: %s", got)
		}
		if got := n.state(forever); got != "running" {
			t.Errorf("one without an end: %s", got)
		}
		n.verify()
	})
}

// TestClockSetWhileDown does so as well where the node's process was not there when the clock was set.
func TestClockSetWhileDown(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		brief := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		in, _ := n.get(brief)
		r := in.record()
		// It was an hour ahead when the sandbox was created, and was set right since.
		r.EndAt, r.Clock.Ahead = r.EndAt.Add(time.Hour), r.Clock.Ahead+time.Hour
		in.set(&r)
		if _, err := n.jour.Put(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		end := r.EndAt.Add(-time.Hour)
		n.down()
		n = m.boot()
		if in, _ = n.get(brief); !in.record().EndAt.Equal(end) {
			t.Errorf("the end is at %v, want %v", in.record().EndAt, end)
		}
		n.verify()
	})
}

// An end moves along with the clock also where that cannot be written.
func TestClockSetOnFullDisk(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		in, _ := n.get(id)
		end := in.record().EndAt
		if err := n.jour.Close(); err != nil {
			t.Fatal(err)
		}
		n.set(time.Hour)
		if got := in.record().EndAt; !got.Equal(end.Add(time.Hour)) {
			t.Errorf("the end moved from %v to %v, want an hour later", end, got)
		}
		if _, err := n.Kill(t.Context(), &agentv1.KillRequest{Id: string(id), TimedOut: true}); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("before its time: %v", err)
		}
	})
}

// A step that is found out about while an operation goes on moves no end that was set after it.
func TestClockSetMeanwhile(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		in, _ := n.get(id)
		if err := in.lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.set(time.Hour)
		r := in.record()
		r.EndAt = now().Add(time.Hour + 5*time.Minute) // by the clock that is an hour ahead
		r.Generation++
		if err := n.put(t.Context(), in, r); err != nil {
			t.Fatal(err)
		}
		n.release(in)
		synctest.Wait()
		if got := in.record().EndAt; !got.Equal(r.EndAt) {
			t.Errorf("the end is at %v, want %v", got, r.EndAt)
		}
	})
}

// TestEndOfAnotherClock refuses to end a sandbox for its time that has time left by the node's own clock.
func TestEndOfAnotherClock(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		in, _ := n.get(id)
		generation := in.record().Generation
		kill := func() error {
			_, err := n.Kill(t.Context(), &agentv1.KillRequest{Id: string(id), TimedOut: true, Generation: generation})
			return err
		}
		pause := func() error {
			_, err := n.Pause(t.Context(), &agentv1.PauseRequest{Id: string(id), TimedOut: true, Generation: generation})
			return err
		}
		for _, err := range []error{kill(), pause()} {
			if !errors.Is(err, sandbox.ErrConflict) {
				t.Errorf("got %v, want a conflict", err)
			}
		}
		if got := n.state(id); got != "running" {
			t.Errorf("before its time: %s", got)
		}
		pass(time.Minute - time.Second)
		if err := kill(); err != nil {
			t.Error(err)
		}
		n.verify()
	})
}

// A sandbox that moves to a machine with another clock has as much time left there.
func TestMoveToAnotherClock(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		id := n.create()
		end := n.end(id)
		p, err := n.depart(id)
		m.check(err)
		p.Sandbox.EndAt = toWireTime(end.Add(time.Hour)) // by a clock that is ahead
		m.check(to.receive(p, p.GetSandbox().GetGeneration()+1))
		m.check(to.arrive(id, p.GetSandbox().GetGeneration()+1))
		if got := to.end(id); !got.Equal(end) {
			t.Errorf("it ends at %v, want %v", got, end)
		}
	})
}
