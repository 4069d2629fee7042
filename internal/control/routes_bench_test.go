package control

import (
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// BenchmarkRouteNote is what a change costs that nobody waits for.
func BenchmarkRouteNote(b *testing.B) {
	l := newRouteLog()
	old := &entry{box: sandbox.Sandbox{ID: "i0", Generation: 1}}
	now := &entry{box: sandbox.Sandbox{ID: "i0", Generation: 2}}
	for b.Loop() {
		l.changed(old, now)
	}
}
