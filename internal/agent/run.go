package agent

import (
	"context"
	"log/slog"
	"runtime"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxRetryWait is the longest time that the loop sleeps; it only matters where a wake-up was forgotten.
const maxRetryWait = time.Minute

// reconcile is the node's loop: it looks at what there is, asks Plan what to do, and has it done.
func (a *Agent) reconcile(ctx context.Context) error {
	workers := make(chan struct{}, a.cfg.MaxStarting+4)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		case <-timer.C:
		}
		a.followClock(ctx)
		at := now()
		actions, next := Plan(a.observe(at), at)
		for _, act := range actions {
			if !a.carryOut(ctx, act, workers) {
				break // no worker is free; the first that is pokes the loop
			}
		}
		a.metrics.reconciled.SetToCurrentTime()
		wait := maxRetryWait
		if !next.IsZero() {
			wait = min(wait, max(time.Millisecond, next.Sub(now())))
		}
		timer.Reset(wait)
	}
}

// observe takes the snapshot that the plan is made from.
func (a *Agent) observe(at time.Time) *State {
	l := a.journal.Ledger()
	waiting, _ := a.gate.waiting()
	c := &a.cfg
	s := &State{
		Decided: a.decidedUntil(),
		Room:    l.Capacity.Sub(l.Allocated.Resources), Acknowledged: a.acked.Load(), Cordoned: a.cordoned.Load(), Waiting: waiting + int(a.short.Load()),
		MaxFilling: max(1, runtime.GOMAXPROCS(0)/2),
		WarmMin:    c.WarmMin, WarmMax: c.WarmMax, WarmKeep: c.WarmKeep, WarmIdle: c.WarmIdle, Retention: c.Retention,
	}
	if a.hasPools() {
		s.Pressure = a.pressure.now(at, c.MemoryPressure)
	}
	s.Garbage = a.observeGarbage()
	all := a.instances()
	s.Sandboxes = make([]SandboxState, 0, len(all))
	for _, in := range all {
		s.Sandboxes = append(s.Sandboxes, in.observe(c.IdleCPUPercent))
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	for k, p := range a.pools {
		ps := PoolState{Key: k, Filling: p.filling, Use: p.use, Custom: p.custom, Stale: p.stale, RetryAt: p.retryAt}
		for _, in := range p.ready {
			ps.Ready = append(ps.Ready, in.id)
		}
		s.Filling += p.filling
		s.Pools = append(s.Pools, ps)
	}
	return s
}

func (in *instance) observe(idleCPU float64) SandboxState {
	in.mu.Lock()
	defer in.mu.Unlock()
	r := &in.rec
	return SandboxState{
		ID: in.id, State: r.State, Busy: len(in.op) > 0, Warm: r.Warm, Ready: r.Ready, Build: r.BuildID != "",
		AutoPause: r.AutoPause, Left: in.left,
		AtOnce: in.atOnce, Idle: r.IdleTimeout, Open: len(in.conns) > 0 || in.busyLocked(idleCPU), Timeout: r.Timeout, UsedAt: in.usedAt,
		Deadline: r.Deadline, EndAt: r.EndAt, EndedAt: r.EndedAt, RetryAt: in.retryAt, Sequence: r.Last.Sequence,
	}
}

// carryOut has an action done in the background; it reports false when no worker is free.
func (a *Agent) carryOut(ctx context.Context, act Action, workers chan struct{}) bool {
	switch act.Kind {
	case ActionForget:
		if in, ok := a.get(act.ID); ok {
			a.forget(ctx, in)
		}
		return true
	case ActionClosePool:
		a.closePool(act.Pool)
		return true
	case ActionFill:
		return a.background(workers, func(ctx context.Context) { a.fillOne(ctx, act.Pool) }, func() { a.filling(act.Pool) })
	case ActionFreeImage:
		return a.background(workers, func(ctx context.Context) { a.freeImage(ctx, act.Image) }, nil)
	case ActionExpire, ActionPause, ActionRetry, ActionGiveBack:
	}
	in, ok := a.get(act.ID)
	if !ok || !in.tryLock() {
		return true // somebody works on it; giving op back pokes the loop
	}
	done := a.background(workers, func(ctx context.Context) {
		defer a.release(in)
		a.retryLater(ctx, in, a.settle(ctx, in, act.Kind))
	}, nil)
	if !done {
		<-in.op
	}
	return done
}

// background runs f in a worker of its own; before is called first, if there is one free.
func (a *Agent) background(workers chan struct{}, f func(context.Context), before func()) bool {
	select {
	case workers <- struct{}{}:
	default:
		return false
	}
	if before != nil {
		before()
	}
	return a.crew.run(func(ctx context.Context) {
		defer a.poke()
		defer func() { <-workers }()
		f(ctx)
	})
}

// settle ends, or goes on ending, a sandbox.
//
// Preconditions: the caller holds in.op.
func (a *Agent) settle(ctx context.Context, in *instance, kind ActionKind) error {
	r := in.record()
	switch {
	case r.State.Ended():
		return nil
	case kind == ActionExpire:
		if r.EndAt.IsZero() || r.EndAt.After(now()) {
			return nil // moved meanwhile
		}
		return a.end(ctx, in, timedOut(endReason(&r)))
	case kind == ActionPause:
		return a.pauseAtEnd(ctx, in)
	case kind == ActionGiveBack:
		if !r.Warm {
			return nil // claimed meanwhile
		}
		a.forgetWarm(in)
		return a.clear(ctx, in)
	case r.State == sandbox.StateStopping:
		return a.end(ctx, in, r.Ending)
	case r.State == sandbox.StatePausing:
		return a.settlePausing(ctx, in)
	case r.State == sandbox.StateResuming:
		return a.settleResuming(ctx, in)
	case r.State == sandbox.StatePaused:
		return a.clearLeft(ctx, in)
	case r.State == sandbox.StateMigrating:
		return a.settleMoving(ctx, in)
	case r.State == sandbox.StateCreating && r.Warm && r.Ready:
		return nil // it has become usable
	case r.State == sandbox.StateCreating:
		if _, known := a.get(in.id); known {
			return a.clear(ctx, in)
		}
	}
	return nil
}

// forget deletes the record of an ended sandbox.
func (a *Agent) forget(ctx context.Context, in *instance) {
	if !in.tryLock() {
		return
	}
	defer a.release(in)
	if err := a.journal.Forget(ctx, in.id); err != nil {
		a.log.WarnContext(ctx, "record not deleted", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
		return
	}
	a.drop(in)
}

func (a *Agent) hasPools() bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return len(a.pools) > 0
}

func (a *Agent) filling(k poolKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.poolFor(k).filling++
}

func (a *Agent) closePool(k poolKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pools[k]; p != nil && len(p.ready)+p.filling == 0 {
		delete(a.pools, k)
	}
}
