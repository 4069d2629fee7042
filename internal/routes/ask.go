package routes

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Route says where a sandbox is. What the table lacks is asked for at the server, once however many ask here, before
// the answer is ErrNotFound. Errors: ErrNotFound; ErrUnavailable for an unknown id while no server can be asked, or while
// too many unknown ids are asked for.
func (t *Table) Route(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	t.mu.RLock()
	r, ok := t.routes[id]
	t.mu.RUnlock()
	if ok {
		return r, nil
	}
	return t.lookup(ctx, id)
}

// waiters wait for news of one sandbox.
type waiters struct {
	n    int
	news chan struct{} // closed when there is some
}

// Await returns the route of a sandbox as soon as it says something else than seen. Errors: those of Route, and ctx's.
func (t *Table) Await(ctx context.Context, id sandbox.ID, seen sandbox.Route) (sandbox.Route, error) {
	for {
		t.mu.Lock()
		r, ok := t.routes[id]
		if !ok || r.News(seen) {
			t.mu.Unlock()
			if !ok {
				return t.lookup(ctx, id)
			}
			return r, nil
		}
		w := t.waiting[id]
		if w == nil {
			w = &waiters{news: make(chan struct{})}
			t.waiting[id] = w
		}
		w.n++
		t.mu.Unlock()
		select {
		case <-w.news:
		case <-ctx.Done():
			t.leave(id, w)
			return r, fmt.Errorf("wait for sandbox %s: %w", id, ctx.Err())
		}
	}
}

func (t *Table) leave(id sandbox.ID, w *waiters) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if w.n--; w.n == 0 && t.waiting[id] == w {
		delete(t.waiting, id)
	}
}

// tellLocked wakes those who wait for news of a sandbox.
func (t *Table) tellLocked(id sandbox.ID) {
	if w := t.waiting[id]; w != nil {
		delete(t.waiting, id)
		close(w.news)
	}
}

// reachWithin is how long requests wait for a server that was followed a moment ago: a link that broke is made anew within
// that time, as a rule.
const reachWithin = 5 * time.Second

// reach calls a server, and again where none is reached and that is news. It is for calls that may be repeated.
func reach[T any](ctx context.Context, t *Table, call func() (T, error)) (T, error) {
	for pause := minPause; ; pause *= 2 {
		resp, err := call()
		if err == nil || connect.IsWireError(err) || t.unfollowed()+pause > reachWithin {
			return resp, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return resp, err
		}
	}
}

// unfollowed is for how long no server has been followed.
func (t *Table) unfollowed() time.Duration {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.staleSince.IsZero() {
		return 0
	}
	return time.Since(t.staleSince)
}

// question is a Lookup under way.
type question struct {
	done  chan struct{}
	route sandbox.Route
	err   error
}

// lookup asks the server for a sandbox, or joins who is asking.
func (t *Table) lookup(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	t.mu.Lock()
	q := t.asking[id]
	if q == nil && !t.lookups.Allow() {
		t.mu.Unlock()
		t.metrics.lookups.WithLabelValues("limited").Inc()
		return sandbox.Route{}, sandbox.Unavailablef("sandbox %s is not known here, and too many unknown ones are asked for: try again in a second", id)
	}
	if q == nil {
		q = &question{done: make(chan struct{})}
		t.asking[id] = q
		go t.ask(context.WithoutCancel(ctx), id, q) // whoever asked first may leave before the others; it ends with CallTimeout
	}
	t.mu.Unlock()
	select {
	case <-q.done:
		return q.route, q.err
	case <-ctx.Done():
		return sandbox.Route{}, fmt.Errorf("look sandbox %s up: %w", id, ctx.Err())
	}
}

func (t *Table) ask(ctx context.Context, id sandbox.ID, q *question) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.CallTimeout)
	defer cancel()
	resp, err := reach(ctx, t, func() (*proxyv1.LookupResponse, error) {
		return t.server.Lookup(ctx, &proxyv1.LookupRequest{Id: string(id)})
	})
	q.route, q.err = fromWire(resp.GetRoute()), fromServer(ctx, err)
	switch {
	case q.err == nil:
		t.metrics.lookups.WithLabelValues("found").Inc()
	case errors.Is(q.err, sandbox.ErrNotFound):
		t.metrics.lookups.WithLabelValues("not_found").Inc()
	default:
		t.metrics.lookups.WithLabelValues("unavailable").Inc()
	}
	t.mu.Lock()
	delete(t.asking, id)
	if q.err == nil {
		t.learnLocked(q.route)
		if n := resp.GetNode(); n.GetId() != "" && !n.GetGone() {
			t.nodes[sandbox.NodeID(n.GetId())] = nodeFromWire(n)
		}
	}
	t.mu.Unlock()
	close(q.done)
}

// learnLocked takes a route from an answer, unless the table knows more already.
func (t *Table) learnLocked(r sandbox.Route) {
	if known, ok := t.routes[r.ID]; ok && known.Generation > r.Generation {
		return
	}
	t.routes[r.ID] = r
	t.tellLocked(r.ID)
}

// Wake makes a sandbox run that is paused and may be resumed by traffic, and returns when it does.
// Errors: ErrNotFound; ErrConflict where traffic may not resume it; ErrExhausted where nothing has room for it; ErrUnavailable.
func (t *Table) Wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	resp, err := reach(ctx, t, func() (*proxyv1.WakeResponse, error) {
		return t.server.Wake(ctx, &proxyv1.WakeRequest{Id: string(id)})
	})
	if err != nil {
		return sandbox.Route{}, fmt.Errorf("wake sandbox %s: %w", id, fromServer(ctx, err))
	}
	r := fromWire(resp.GetRoute())
	t.mu.Lock()
	defer t.mu.Unlock()
	t.learnLocked(r)
	return r, nil
}

// SandboxBySignature returns the sandbox that a signed file URL belongs to. Errors: ErrNotFound, ErrInvalid,
// ErrExhausted, ErrUnavailable.
//
//nolint:revive // the parts of a signed address, as the proxy asks for them
func (t *Table) SandboxBySignature(ctx context.Context, path, op, user, signature, expiration string) (sandbox.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.CallTimeout)
	defer cancel()
	resp, err := t.server.Sign(ctx, &proxyv1.SignRequest{
		Path: path, Operation: op, User: user, Signature: signature, Expiration: expiration,
	})
	if err != nil {
		return "", fmt.Errorf("find a signature's sandbox: %w", fromServer(ctx, err))
	}
	return sandbox.ParseID(resp.GetId())
}
