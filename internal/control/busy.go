package control

import (
	"context"
	"sync"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// busy is the sandboxes that something is being decided about here: one thing at a time for each.
type busy struct {
	mu  sync.Mutex
	ids map[sandbox.ID]chan struct{}
}

func newBusy() *busy { return &busy{ids: make(map[sandbox.ID]chan struct{})} }

// try takes a sandbox unless somebody else has it.
func (b *busy) try(id sandbox.ID) (release func(), ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ids[id] != nil {
		return nil, false
	}
	done := make(chan struct{})
	b.ids[id] = done
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.ids, id)
		close(done)
	}, true
}

// take waits until nobody else has a sandbox. Errors: ErrUnavailable when ctx ends first.
func (b *busy) take(ctx context.Context, id sandbox.ID) (release func(), err error) {
	for {
		if release, ok := b.try(id); ok {
			return release, nil
		}
		if err := b.wait(ctx, id); err != nil {
			return nil, err
		}
	}
}

// wait returns when nobody has the sandbox, or had not for a moment.
func (b *busy) wait(ctx context.Context, id sandbox.ID) error {
	b.mu.Lock()
	done := b.ids[id]
	b.mu.Unlock()
	if done == nil {
		return nil
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return sandbox.Unavailablef("sandbox %s is being moved: it took too long to wait for", id)
	}
}
