package agent

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// stepMin is how far the machine's clock must have jumped for it to be a jump: what is less has no harm in it.
	stepMin = 2 * time.Second
	// movers is how many ends are moved at once: their writes share the journal's transactions.
	movers = 128
)

// clock notices when somebody sets the machine's clock. Times in records are those of the wall clock, since they must outlive
// the process; how long a sandbox lives is not to change with it.
type clock struct {
	turn chan struct{} // of capacity 1: held by whoever compares and moves
	born time.Time     // with the monotonic clock's reading
	wall time.Time
	mono time.Duration
}

func newClock() *clock {
	t := time.Now()
	return &clock{turn: make(chan struct{}, 1), born: t, wall: t.Round(0)}
}

// step returns by how much the wall clock has jumped since the last call: what it went on by beyond the monotonic one.
//
// Preconditions: the caller holds turn, or is alone.
func (c *clock) step(wall time.Time, mono time.Duration) time.Duration {
	d := wall.Sub(c.wall) - (mono - c.mono)
	c.wall, c.mono = wall, mono
	if d.Abs() < stepMin {
		return 0
	}
	return d
}

// followClock moves what is planned for later along with the machine's clock, if that was set. It is called before any such
// time is read or set. While the node is down nobody can tell a jump from time that passed.
func (a *Agent) followClock(ctx context.Context) {
	select {
	case a.clock.turn <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-a.clock.turn }()
	d := a.clock.step(time.Now().Round(0), time.Since(a.clock.born))
	if d == 0 {
		return
	}
	a.log.WarnContext(ctx, "the machine's clock was set: the ends of sandboxes move along", slog.Duration("by", d))
	a.moveBy(ctx, d)
}

// moveBy moves the ends of sandboxes, and what waits to be tried again.
func (a *Agent) moveBy(ctx context.Context, d time.Duration) {
	a.mu.Lock()
	for _, p := range a.pools {
		p.retryAt, p.use.last = moved(p.retryAt, d), moved(p.use.last, d)
	}
	a.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(movers)
	for _, in := range a.instances() {
		g.Go(func() error {
			if err := a.moveEnd(ctx, in, d); err != nil && ctx.Err() == nil {
				a.log.WarnContext(ctx, "end of a sandbox not moved", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
			}
			return nil
		})
	}
	_ = g.Wait() // what failed is logged
}

func (a *Agent) moveEnd(ctx context.Context, in *instance, d time.Duration) error {
	in.mu.Lock()
	in.retryAt, in.usedAt = moved(in.retryAt, d), moved(in.usedAt, d)
	in.mu.Unlock()
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	r := in.record()
	if r.State != sandbox.StateRunning || r.EndAt.IsZero() {
		return nil
	}
	r.EndAt = r.EndAt.Add(d)
	r.Generation++
	return a.put(ctx, in, r, journal.Change{Type: "timeout_set", Time: now(), Sandbox: r.Sandbox})
}

// moved returns t moved by d; zero stays what it is.
func moved(t time.Time, d time.Duration) time.Time {
	if t.IsZero() {
		return t
	}
	return t.Add(d)
}
