package agent

import (
	"context"
	"sync"
)

// crew is the goroutines that outlive the call that started them.
type crew struct {
	ctx    context.Context //nolint:containedctx // the life of the background work; no call's
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	stopped bool
}

func newCrew() *crew {
	c := &crew{}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// run starts f, and reports false when the crew has stopped. F's context ends with the crew.
func (c *crew) run(f func(ctx context.Context)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return false
	}
	c.wg.Go(func() { f(c.ctx) })
	return true
}

// stop ends what runs and waits for it.
func (c *crew) stop() {
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	c.cancel()
	c.wg.Wait()
}
