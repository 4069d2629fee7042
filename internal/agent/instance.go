package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// instance is one sandbox of this node, in memory.
type instance struct {
	id sandbox.ID
	// op is of capacity 1 and held by whoever changes the sandbox.
	op chan struct{}

	mu     sync.Mutex
	rec    journal.Record // as last written to the journal
	conns  map[tracked]struct{}
	closed bool         // no new connections: the sandbox ends or has ended
	exit   *engine.Exit // set when the guest has ended by itself
	life   int          // numbers the guests that the sandbox has had; who watches an earlier one is ignored
	left   bool         // it is paused or moves, and its guest or network may not be gone yet
	// departing means that it is about to be saved for a move: no new connections. Quiet, of capacity 1, gets a signal when
	// one ends.
	departing bool
	quiet     chan struct{}
	resume    attempt
	atOnce    bool              // somebody wants its end to come at once
	usedAt    time.Time         // when a connection was last made or ended, at first when it was made or found
	cancel    func(cause error) // ends the start under way
	guest     *guestConn        // a connection that is kept for the claim of a warm sandbox
	samples   samples
	retryAt   time.Time // no clean-up is tried before
	tries     int
}

func newInstance(r *journal.Record) *instance {
	return &instance{id: r.ID, op: make(chan struct{}, 1), rec: *r, quiet: make(chan struct{}, 1), usedAt: now()}
}

// lock takes op.
func (in *instance) lock(ctx context.Context) error {
	select {
	case in.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for sandbox %s: %w", in.id, ctx.Err())
	}
}

// tryLock takes op if nobody has it.
func (in *instance) tryLock() bool {
	select {
	case in.op <- struct{}{}:
		return true
	default:
		return false
	}
}

func (in *instance) record() journal.Record {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.rec
}

func (in *instance) set(r *journal.Record) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.rec = *r
}

// setNetwork notes the network before anything is written: nothing needs it in the journal until the sandbox is usable.
func (in *instance) setNetwork(n journal.Network) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.rec.Network = n
}

// interruptible returns a context that ends when the guest does, or when interrupt is called.
func (in *instance) interruptible(ctx context.Context) (inner context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.cancel = cancel
	if in.exit != nil {
		cancel(sandbox.Unavailablef("sandbox %s ended", in.id))
	}
	return ctx, func() {
		cancel(nil)
		in.mu.Lock()
		defer in.mu.Unlock()
		in.cancel = nil
	}
}

// interrupt ends the start under way, if there is one.
func (in *instance) interrupt(cause error) {
	in.mu.Lock()
	f := in.cancel
	in.mu.Unlock()
	if f != nil {
		f(cause)
	}
}

// ended notes that the guest of a life is gone, closes every connection to it and ends the start under way. It reports
// false when the sandbox has nothing to do with that guest any more.
func (in *instance) ended(life int, x engine.Exit, reason string) bool {
	in.mu.Lock()
	if in.life != life {
		in.mu.Unlock()
		return false
	}
	in.exit = &x
	in.mu.Unlock()
	in.closeConns()
	in.interrupt(sandbox.Unavailablef("sandbox %s ended: %s", in.id, reason))
	return true
}

// renew begins another life: what becomes of the guest so far is nobody's concern, and connections are allowed again as
// soon as the state is running.
func (in *instance) renew() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.life++
	in.exit, in.closed = nil, false
}

// lives returns the number of the present life.
func (in *instance) lives() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.life
}

// transient reports whether something is done with the sandbox that its end can interrupt.
func (in *instance) transient() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.departing || in.rec.State == sandbox.StatePausing || in.rec.State == sandbox.StateResuming
}

// alive reports whether the guest is not known to have ended.
func (in *instance) alive() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.exit == nil && !in.closed
}

// keepGuest keeps a connection for the claim; takeGuest takes it.
func (in *instance) keepGuest(g *guestConn) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.guest = g
}

func (in *instance) takeGuest() *guestConn {
	in.mu.Lock()
	defer in.mu.Unlock()
	g := in.guest
	in.guest = nil
	return g
}

func (in *instance) dropGuest() { in.takeGuest().close() }

// failed notes a failed clean-up and returns when to try again: after 100 ms, doubling up to 30 s.
func (in *instance) failed(at time.Time) time.Time {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.retryAt = at.Add(backoff(in.tries))
	in.tries++
	return in.retryAt
}

// backoff returns the wait after so many failures.
func backoff(tries int) time.Duration {
	return min(30*time.Second, 100*time.Millisecond<<min(tries, 20))
}
