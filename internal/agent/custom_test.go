package agent

import (
	"testing"
	"time"
)

// TestCustomSizes checks that a size that was asked for once keeps no sandbox warm, and one that is asked for often does.
func TestCustomSizes(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct {
		name   string
		custom bool
		weight float64
		want   int
	}{
		{"the template's size, once", false, 1, 4},
		{"the template's size, often", false, 9, 9},
		{"a size of its own, once", true, 1, 0},
		{"a size of its own, often", true, 6, 5},
		{"a size of its own, too often", true, 60, 16},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &planner{now: now, state: &State{WarmMin: 4, WarmMax: 16, WarmKeep: time.Hour}}
			if got := p.target(&PoolState{Custom: tc.custom, Use: usage{last: now, weight: tc.weight}}); got != tc.want {
				t.Errorf("target %d, want %d", got, tc.want)
			}
		})
	}
}

// TestCustomSizesAreRemembered checks that a size counts for a while after it was asked for, and is then forgotten.
func TestCustomSizesAreRemembered(t *testing.T) {
	now := time.Now()
	for after, want := range map[time.Duration]int{0: 0, time.Second: 0, time.Hour / 2: 1} {
		pools := []PoolState{{Key: poolKey{digest: "d", size: small()}, Custom: true, Use: usage{last: now, weight: 1}}}
		actions, _ := Plan(&State{WarmMin: 4, WarmMax: 16, WarmKeep: time.Hour, Pools: pools}, now.Add(after))
		if len(actions) != want {
			t.Errorf("%s after its use: %v; want %d actions", after, actions, want)
		}
	}
}
