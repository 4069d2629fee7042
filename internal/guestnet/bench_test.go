package guestnet

import (
	"context"
	"strconv"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// BenchmarkAcquire measures a network from the pool and one that is made on demand.
func BenchmarkAcquire(b *testing.B) {
	for _, tc := range []struct {
		name     string
		pooled   bool
		internet bool
	}{{"pooled", true, true}, {"pooled/closed", true, false}, {"cold", false, true}} {
		b.Run(tc.name, func(b *testing.B) {
			l := newLab(b)
			m := l.manager()
			ctx := context.Background()
			must(b, m.Sweep(ctx))
			var i int
			for b.Loop() {
				if tc.pooled {
					b.StopTimer()
					m.cfg.PoolSize = 1
					m.fill(ctx)
					b.StartTimer()
				}
				id := sandbox.ID("bench" + strconv.Itoa(i))
				i++
				a, err := m.Acquire(ctx, id, Policy{AllowInternet: tc.internet})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				must(b, m.Release(ctx, a.SandboxID))
				m.reap()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkRelease measures giving a network back, and BenchmarkPolicy a change of what is allowed.
func BenchmarkRelease(b *testing.B) {
	l := newLab(b)
	m := l.manager()
	ctx := context.Background()
	for b.Loop() {
		b.StopTimer()
		l.acquire(m, "bench", true)
		b.StartTimer()
		must(b, m.Release(ctx, "bench"))
		b.StopTimer()
		m.reap()
		b.StartTimer()
	}
}

func BenchmarkPolicy(b *testing.B) {
	l := newLab(b)
	m := l.manager()
	ctx := context.Background()
	a := l.acquire(m, "bench", true)
	for i := 0; b.Loop(); i++ {
		must(b, m.SetPolicy(ctx, a.SandboxID, Policy{AllowInternet: i%2 == 0}))
	}
}
