package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// waits has requests wait for sandboxes that do not run but will.
type waits struct {
	router  router
	guests  *guests
	timeout time.Duration
	metrics *metrics

	mu     sync.Mutex
	waking map[sandbox.ID]*waking
}

// waking is a Wake under way, for all requests that wait for it.
type waking struct {
	done   chan struct{}
	cancel context.CancelFunc
	n      int // the requests that wait; guarded by waits.mu
	route  sandbox.Route
	err    error
}

// errWaited says that a request has waited for a sandbox as long as it may.
var errWaited = errors.New("the sandbox did not run in time")

// serving returns dest with the route of a running sandbox: at once where it runs, else as soon as it does. A paused one
// that traffic may resume is woken. All waiting of a request ends at dest.until.
func (w *waits) serving(ctx context.Context, dest destination) (destination, *failure) {
	if !awaited(dest.route) {
		return dest, notServing(dest.target, dest.route)
	}
	if dest.until.IsZero() {
		dest.until = time.Now().Add(w.timeout)
	}
	ctx, end, fail := w.begin(ctx, dest)
	if fail != nil {
		return dest, fail
	}
	defer end()
	for awaited(dest.route) {
		route, err := w.next(ctx, dest.route)
		if err != nil {
			return dest, w.unserved(ctx, dest, err)
		}
		dest.route = route
	}
	return dest, notServing(dest.target, dest.route)
}

// awaited reports whether a sandbox will run, by itself or when it is woken.
func awaited(r sandbox.Route) bool {
	switch r.State { //nolint:exhaustive // all others run, or will not
	case sandbox.StateCreating, sandbox.StatePausing, sandbox.StateResuming, sandbox.StateMigrating:
		return true
	case sandbox.StatePaused:
		return r.AutoResume
	default:
	}
	return false
}

// next waits for what a sandbox becomes, and sees to it that a paused one becomes something.
func (w *waits) next(ctx context.Context, seen sandbox.Route) (sandbox.Route, error) {
	if seen.State != sandbox.StatePaused {
		return w.router.Await(ctx, seen.ID, seen)
	}
	route, err := w.wake(ctx, seen.ID)
	if errors.Is(err, sandbox.ErrConflict) || err == nil && route.State == sandbox.StatePaused { // for good, or on its way
		seen.AutoResume = false
		if now, err := w.router.Route(ctx, seen.ID); err == nil && now.News(seen) {
			return now, nil
		}
		return seen, nil
	}
	return route, err
}

// attendance is a request that waits, as far as its sandbox is concerned.
type attendance struct{ cancel context.CancelCauseFunc }

func (a *attendance) cut(why error) { a.cancel(why) }

// begin counts a request among its sandbox's while it waits. The context ends when the waiting must.
func (w *waits) begin(ctx context.Context, dest destination) (context.Context, func(), *failure) {
	ctx, stop := context.WithDeadlineCause(ctx, dest.until, errWaited)
	ctx, cancel := context.WithCancelCause(ctx)
	a := &attendance{cancel: cancel}
	if _, fail := w.guests.join(dest, a); fail != nil {
		cancel(nil)
		stop()
		return nil, nil, fail
	}
	w.metrics.waiting.Inc()
	return ctx, func() {
		w.metrics.waiting.Dec()
		w.guests.leave(dest.id, a)
		cancel(nil)
		stop()
	}, nil
}

// unserved answers a request for which the sandbox did not come to run.
func (w *waits) unserved(ctx context.Context, dest destination, err error) *failure {
	t := dest.target
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errShutdown):
		return shuttingDown(t, err)
	case errors.Is(cause, errSandboxEnded):
		route, err := w.router.Route(context.WithoutCancel(ctx), t.id)
		if err != nil {
			return unrouted(ctx, t, err)
		}
		if fail := notServing(t, route); fail != nil {
			return fail
		}
		return unreachable(t, cause)
	case errors.Is(cause, errWaited):
		return overdue(t, dest.route.State, cause)
	case cause != nil:
		return clientGone(t, err)
	case errors.Is(err, sandbox.ErrExhausted):
		return noRoom(t, err)
	}
	return unrouted(ctx, t, err)
}

// wake makes a sandbox run, or joins those who do. It goes on for as long as anybody waits for it.
func (w *waits) wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	w.mu.Lock()
	k := w.waking[id]
	if k == nil {
		k = &waking{done: make(chan struct{})}
		var wakeCtx context.Context
		wakeCtx, k.cancel = context.WithTimeout(context.WithoutCancel(ctx), w.timeout)
		w.waking[id] = k
		go w.rouse(wakeCtx, id, k)
	}
	k.n++
	w.mu.Unlock()
	select {
	case <-k.done:
		return k.route, k.err
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if k.n--; k.n == 0 {
		k.cancel()
		w.forgetLocked(id, k)
	}
	return sandbox.Route{}, fmt.Errorf("wake sandbox %s: %w", id, context.Cause(ctx))
}

func (w *waits) rouse(ctx context.Context, id sandbox.ID, k *waking) {
	defer k.cancel()
	k.route, k.err = w.router.Wake(ctx, id)
	w.metrics.woken(k.err)
	w.mu.Lock()
	w.forgetLocked(id, k)
	w.mu.Unlock()
	close(k.done)
}

func (w *waits) forgetLocked(id sandbox.ID, k *waking) {
	if w.waking[id] == k {
		delete(w.waking, id)
	}
}
