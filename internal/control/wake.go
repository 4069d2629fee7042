package control

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// wakes are the paused sandboxes that traffic is making run.
type wakes struct {
	mu sync.Mutex
	at map[sandbox.ID]*wake
	// ending ends every wake under way; it is closed once, under mu.
	ending chan struct{}
	ended  bool
	under  sync.WaitGroup // grows only under mu and while not ended
}

// wake is one of them.
type wake struct {
	done  chan struct{}
	route sandbox.Route
	err   error
}

func newWakes() *wakes {
	return &wakes{at: make(map[sandbox.ID]*wake), ending: make(chan struct{})}
}

// close ends what is under way and lets nothing begin; it returns when all has ended.
func (w *wakes) close() {
	w.mu.Lock()
	if !w.ended {
		w.ended = true
		close(w.ending)
	}
	w.mu.Unlock()
	w.under.Wait()
}

// Wake makes a sandbox run that is paused and may be resumed by traffic, for as long as the timeout that it was last
// given, and returns its route when it runs. It waits for a pause, a resume or a move that is under way. However many
// call, the sandbox is resumed once, and that goes on when they leave.
// Errors: ErrNotFound, ErrConflict for a paused one that traffic may not resume, ErrExhausted, ErrUnavailable.
func (c *Control) Wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	k, err := c.wakes.join(id, func() (sandbox.Route, error) { return c.rouse(context.WithoutCancel(ctx), id) })
	if err != nil {
		return sandbox.Route{}, err
	}
	select {
	case <-k.done:
		return k.route, k.err
	case <-ctx.Done():
		return sandbox.Route{}, fmt.Errorf("wake sandbox %s: %w", id, ctx.Err())
	}
}

// join returns the wake of a sandbox that is under way, or begins one.
func (w *wakes) join(id sandbox.ID, rouse func() (sandbox.Route, error)) (*wake, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if k := w.at[id]; k != nil {
		return k, nil
	}
	if w.ended {
		return nil, sandbox.Unavailablef("wake sandbox %s: the server is stopping", id)
	}
	k := &wake{done: make(chan struct{})}
	w.at[id] = k
	w.under.Go(func() {
		k.route, k.err = rouse()
		w.mu.Lock()
		delete(w.at, id)
		w.mu.Unlock()
		close(k.done)
	})
	return k, nil
}

// rouse makes a sandbox run.
func (c *Control) rouse(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-c.wakes.ending:
			cancel()
		case <-stop:
		}
	}()
	for {
		box, err := c.live(ctx, id)
		if err != nil {
			return sandbox.Route{}, err
		}
		if route, done, err := c.rouseOnce(ctx, box); done {
			return route, err
		}
	}
}

// rouseOnce resumes a sandbox that is paused, or about to be; it waits for news of one that is on another way. It is not
// done where the sandbox has to be looked at again.
func (c *Control) rouseOnce(ctx context.Context, box sandbox.Sandbox) (route sandbox.Route, done bool, err error) {
	switch box.State { //nolint:exhaustive // live has refused what has ended
	case sandbox.StateRunning:
		return box.Route(), true, nil
	case sandbox.StatePaused, sandbox.StatePausing:
	case sandbox.StateStopping, sandbox.StateStopped:
		return sandbox.Route{}, true, sandbox.NotFoundf("sandbox %s is %s", box.ID, box.State)
	default:
		_, err := c.Await(ctx, box.ID, box.Route())
		return sandbox.Route{}, err != nil, err
	}
	if !box.Route().AutoResume {
		return sandbox.Route{}, true, sandbox.Conflictf("sandbox %s is %s and cannot be resumed by a request: connect to it to resume it", box.ID, box.State)
	}
	h, err := c.hold(ctx, box.ID)
	if err != nil {
		return sandbox.Route{}, true, err
	}
	timeout := h.box.Timeout
	if timeout <= 0 {
		timeout = Never
	}
	woken, _, err := c.resume(ctx, h, ConnectRequest{Timeout: timeout})
	if errors.Is(err, sandbox.ErrConflict) { // it has left on a move before it could be resumed
		if now, ok := c.index.get(box.ID); ok && now.Route().News(box.Route()) {
			return sandbox.Route{}, false, nil
		}
	}
	return woken.Route(), true, err
}
