package agent

import (
	"context"
	"errors"
	"sync"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// transfers lets each artifact be moved once, however many ask for it.
type transfers struct {
	mu    sync.Mutex
	under map[string]*transfer
}

// transfer is one that is under way.
type transfer struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when moved and err are final
	moved  int64
	err    error
	wait   int // who waits for it; transfers.mu guards it
}

func newTransfers() *transfers { return &transfers{under: map[string]*transfer{}} }

var errNobodyWaits = errors.New("nobody waits for it any more")

// once carries out do, or waits for the one with the same key that is under way, and returns how many bytes were moved for
// this call. It goes on until the last who waits has left, whatever becomes of the first.
func (ts *transfers) once(ctx context.Context, c *crew, key string, do func(context.Context) (int64, error)) (moved int64, err error) {
	for {
		t, mine := ts.join(ctx, c, key, do)
		if t == nil {
			return 0, sandbox.Unavailablef("the node is shutting down")
		}
		select {
		case <-t.done:
		case <-ctx.Done():
			ts.leave(t)
			return 0, context.Cause(ctx)
		}
		switch {
		case mine:
			return t.moved, t.err
		case !errors.Is(t.err, errNobodyWaits):
			return 0, t.err
		}
	}
}

// join enters the transfer of a key, and starts it where there is none; nil when the node shuts down.
func (ts *transfers) join(ctx context.Context, c *crew, key string, do func(context.Context) (int64, error)) (t *transfer, mine bool) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t := ts.under[key]; t != nil {
		t.wait++
		return t, false
	}
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	t = &transfer{cancel: cancel, done: make(chan struct{}), wait: 1}
	started := c.run(func(crew context.Context) {
		stop := context.AfterFunc(crew, func() { cancel(sandbox.Unavailablef("the node is shutting down")) })
		defer stop()
		t.moved, t.err = do(work)
		cancel(nil)
		ts.mu.Lock()
		delete(ts.under, key)
		ts.mu.Unlock()
		close(t.done)
	})
	if !started {
		cancel(nil)
		return nil, false
	}
	ts.under[key] = t
	return t, true
}

// leave takes one out who waited; the last one ends the transfer.
func (ts *transfers) leave(t *transfer) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t.wait--; t.wait == 0 {
		t.cancel(errNobodyWaits)
	}
}
