package agent

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
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

// TestClockSet moves the ends of sandboxes with the clock, so that none lives shorter or longer for it.
func TestClockSet(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		brief := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		forever := n.create(func(r *agentv1.CreateRequest) { r.Timeout = nil })
		in, _ := n.get(brief)
		end := in.record().EndAt
		// The bubble's clocks cannot be set apart: this is what a forward jump of an hour looks like.
		n.clock.turn <- struct{}{}
		n.clock.wall = n.clock.wall.Add(-time.Hour)
		<-n.clock.turn
		n.poke()
		synctest.Wait()
		if got := in.record().EndAt; !got.Equal(end.Add(time.Hour)) {
			t.Errorf("the end moved from %v to %v, want an hour later", end, got)
		}
		n.clock.turn <- struct{}{}
		n.clock.wall = n.clock.wall.Add(time.Hour)
		<-n.clock.turn
		n.poke()
		synctest.Wait()
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
