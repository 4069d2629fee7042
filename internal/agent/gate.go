package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// gate lets a bounded number of cold starts run at once. Those that somebody waits for go first, in the order in which
// they came; the filling of the pool goes when nobody waits. A full queue refuses.
type gate struct {
	most int

	mu    sync.Mutex
	free  int
	first []*ticket // somebody waits
	later []*ticket // nobody does
}

type ticket struct {
	since time.Time
	turn  chan struct{} // closed when it is this one's turn
}

func newGate(slots, most int) *gate { return &gate{most: most, free: slots} }

// enter waits for a slot; the caller gives it back with leave. Errors: ErrExhausted when too many wait, or ctx's.
func (g *gate) enter(ctx context.Context, background bool) error {
	t := &ticket{since: time.Now(), turn: make(chan struct{})}
	g.mu.Lock()
	queue := &g.first
	if background {
		queue = &g.later
	}
	if len(*queue) >= g.most {
		g.mu.Unlock()
		return sandbox.Exhaustedf("%d sandboxes wait to be started already, which is the most that may: try again later", g.most)
	}
	*queue = append(*queue, t)
	g.admit()
	g.mu.Unlock()
	select {
	case <-t.turn:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, o := range *queue {
		if o == t {
			*queue = append((*queue)[:i:i], (*queue)[i+1:]...)
			return fmt.Errorf("wait for a turn to start: %w", context.Cause(ctx))
		}
	}
	g.free++ // it was given a slot meanwhile
	g.admit()
	return fmt.Errorf("wait for a turn to start: %w", context.Cause(ctx))
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.free++
	g.admit()
}

// admit hands free slots out.
//
// Preconditions: g.mu is held.
func (g *gate) admit() {
	for g.free > 0 {
		queue := &g.first
		if len(*queue) == 0 {
			queue = &g.later
		}
		if len(*queue) == 0 {
			return
		}
		close((*queue)[0].turn)
		*queue = (*queue)[1:]
		g.free--
	}
}

// waiting returns how many wait whom somebody waits for, and for how long the first of them has.
func (g *gate) waiting() (n int, age time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.first) == 0 {
		return 0, 0
	}
	return len(g.first), time.Since(g.first[0].since)
}
