package lifecycle

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestPlan(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	box := func(end time.Duration, change func(*sandbox.Sandbox)) sandbox.Sandbox {
		s := sandbox.Sandbox{ID: "a", Generation: 7, State: sandbox.StateRunning, EndAt: now.Add(end), Timeout: time.Minute}
		if change != nil {
			change(&s)
		}
		return s
	}
	pauses := func(s *sandbox.Sandbox) { s.AutoPause = true }
	idle := func(s *sandbox.Sandbox) { s.AutoPause, s.IdleTimeout = true, true }
	calm := Activity{Complete: true}
	tests := []struct {
		name string
		item Item
		want Verdict
	}{
		{"not yet", Item{Sandbox: box(time.Second, nil), Activity: calm, Known: true}, Verdict{Kind: Wait, At: now.Add(time.Second)}},
		{"passed", Item{Sandbox: box(0, nil), Activity: Activity{Open: 3}, Known: true}, Verdict{Kind: Kill, Forced: true}},
		{"never", Item{Sandbox: box(0, func(s *sandbox.Sandbox) { s.EndAt = time.Time{} }), Known: true}, Verdict{Kind: Nothing}},
		{"paused", Item{Sandbox: box(0, func(s *sandbox.Sandbox) { s.State = sandbox.StatePaused }), Known: true}, Verdict{Kind: Nothing}},
		{"node not heard", Item{Sandbox: box(0, nil), Activity: calm}, Verdict{Kind: Wait, At: now.Add(time.Second)}},
		{"pause", Item{Sandbox: box(0, pauses), Activity: calm, Known: true}, Verdict{Kind: Pause}},
		{"pause in use", Item{Sandbox: box(0, pauses), Activity: Activity{Open: 1, Complete: true}, Known: true}, Verdict{Kind: Wait, At: now.Add(time.Second)}},
		{"pause, grace over", Item{Sandbox: box(-5*time.Second, pauses), Activity: Activity{Open: 1}, Known: true}, Verdict{Kind: Pause, Forced: true}},
		{"idle in use", Item{Sandbox: box(-time.Hour, idle), Activity: Activity{Open: 1, Complete: true}, Known: true}, Verdict{Kind: Wait, At: now.Add(time.Second)}},
		{"idle at work", Item{Sandbox: box(-time.Hour, idle), Activity: Activity{Busy: true, Complete: true}, Known: true}, Verdict{Kind: Wait, At: now.Add(time.Second)}},
		{"idle, proxy silent", Item{Sandbox: box(-time.Hour, idle), Known: true}, Verdict{Kind: Wait, At: now.Add(time.Second)}},
		{
			"idle, used lately",
			Item{Sandbox: box(-time.Hour, idle), Activity: Activity{Last: now.Add(-time.Second), Complete: true}, Known: true},
			Verdict{Kind: Wait, At: now.Add(59 * time.Second)},
		},
		{
			"idle for long",
			Item{Sandbox: box(-time.Hour, idle), Activity: Activity{Last: now.Add(-time.Minute), Complete: true}, Known: true},
			Verdict{Kind: Pause},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Plan(now, []Item{tt.item}, Policy{})[0]
			if got.Kind != Nothing && got.Reason == "" {
				t.Error("a verdict without a reason")
			}
			tt.want.ID, tt.want.Generation, got.Reason = "a", 7, ""
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
