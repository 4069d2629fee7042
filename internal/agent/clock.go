package agent

import (
	"context"
	"crypto/rand"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

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
	read func() (wall time.Time, mono time.Duration)
	boot string
	wall time.Time
	mono time.Duration
}

func newClock(sinceBoot func() (string, time.Duration)) *clock {
	c := &clock{turn: make(chan struct{}, 1)}
	boot, up := sinceBoot()
	born := time.Now() // with the monotonic clock's reading
	c.boot = boot
	c.read = func() (time.Time, time.Duration) {
		t := time.Now()
		return t.Round(0), up + t.Sub(born)
	}
	c.wall, c.mono = c.read()
	return c
}

// sinceBoot names the machine's last start and says what its monotonic clock shows; where that cannot be told, what was written
// by an earlier process cannot be compared with.
func sinceBoot() (id string, up time.Duration) {
	var ts unix.Timespec
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return rand.Text(), 0
	}
	return strings.TrimSpace(string(raw)), time.Duration(ts.Nano())
}

// reading is the clock as records remember it.
func (c *clock) reading() journal.Clock {
	wall, mono := c.read()
	return journal.Clock{Boot: c.boot, Ahead: time.Duration(wall.UnixNano()) - mono}
}

// since returns by how much the clock was set since it stood as then; 0 where that cannot be told, or does no harm.
func (c *clock) since(then journal.Clock) time.Duration {
	at := c.reading()
	if d := at.Ahead - then.Ahead; at.Boot == then.Boot && d.Abs() >= stepMin {
		return d
	}
	return 0
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
// time is read or set.
func (a *Agent) followClock(ctx context.Context) {
	select {
	case a.clock.turn <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-a.clock.turn }()
	d := a.clock.step(a.clock.read())
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
	if until := a.decidedUntil(); !until.IsZero() {
		until = until.Add(d)
		a.decided.Store(&until)
	}
	var g errgroup.Group
	g.SetLimit(movers)
	for _, in := range a.instances() {
		in.mu.Lock()
		in.retryAt, in.usedAt = moved(in.retryAt, d), moved(in.usedAt, d)
		in.mu.Unlock()
		g.Go(func() error {
			if err := a.moveEnd(ctx, in); err != nil && ctx.Err() == nil {
				a.log.WarnContext(ctx, "end of a sandbox not moved", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
			}
			return nil
		})
	}
	_ = g.Wait() // what failed is logged
}

// moveEnd moves a sandbox's end by what the clock was set since that was written.
func (a *Agent) moveEnd(ctx context.Context, in *instance) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	return a.followEnd(ctx, in)
}

// followEnd is moveEnd for whoever holds in.op. Where it cannot be written, it holds nevertheless: the record says by which clock
// its times are meant. A machine that was started again may have any time: there is nothing to compare with.
func (a *Agent) followEnd(ctx context.Context, in *instance) error {
	r := in.record()
	d := a.clock.since(r.Clock)
	if d == 0 || r.State.Ended() || r.State == sandbox.StatePaused { // a paused one gets a new end as it resumes
		return nil
	}
	r.EndAt, r.Deadline, r.Clock = moved(r.EndAt, d), moved(r.Deadline, d), a.clock.reading()
	in.set(&r)
	if r.State != sandbox.StateRunning || r.EndAt.IsZero() {
		return nil // it is written with what the sandbox becomes
	}
	r.Generation++
	return a.put(ctx, in, r, journal.Change{Type: "timeout_set", Time: now(), Sandbox: r.Sandbox})
}

// checkTime refuses to end a sandbox for its time while that is not up by this machine's clock: the one by which a server decided
// may be another. It must not be called with in.op held.
func (a *Agent) checkTime(ctx context.Context, in *instance) error {
	a.followClock(ctx)
	r := in.record()
	if left := r.EndAt.Sub(now()); r.State == sandbox.StateRunning && !r.EndAt.IsZero() && left > stepMin {
		return sandbox.Conflictf("sandbox %s has %s left by the clock of node %s", in.id, left.Round(time.Millisecond), a.node)
	}
	return nil
}

// stamp notes by which clock the times are meant that a record gets in place of an older one's. What it keeps of that is moved
// along.
func (c *clock) stamp(old, r *journal.Record) {
	end, deadline := r.EndAt.Equal(old.EndAt), r.Deadline.Equal(old.Deadline)
	if end && deadline || r.Clock != old.Clock {
		return
	}
	d := c.since(old.Clock)
	if end {
		r.EndAt = moved(r.EndAt, d)
	}
	if deadline {
		r.Deadline = moved(r.Deadline, d)
	}
	r.Clock = c.reading()
}

// moved returns t moved by d; zero stays what it is.
func moved(t time.Time, d time.Duration) time.Time {
	if t.IsZero() {
		return t
	}
	return t.Add(d)
}
