package guest

import (
	"context"
	"slices"
	"sync"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

// subscriberQueue is how many events wait for one subscriber. A full queue holds the process back, as a full pipe
// would, until the subscriber reads on or goes away.
const subscriberQueue = 8

// subscriber receives what a process does from the moment of subscribing. The channel is closed after the end event.
type subscriber struct {
	events chan *process.ProcessEvent
	gone   <-chan struct{}
}

// hub hands the events of one process to its subscribers. Without any, output is dropped and the process runs on.
type hub struct {
	mu     sync.Mutex
	subs   []*subscriber // replaced, never changed in place
	closed bool
}

// subscribe returns nil if the process has ended. The subscription ends with ctx.
func (h *hub) subscribe(ctx context.Context) *subscriber {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	s := &subscriber{events: make(chan *process.ProcessEvent, subscriberQueue), gone: ctx.Done()}
	h.subs = append(slices.Clip(h.subs), s)
	return s
}

func (h *hub) unsubscribe(s *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := slices.Index(h.subs, s); i >= 0 {
		h.subs = slices.Delete(slices.Clone(h.subs), i, i+1)
	}
}

// idle says that nobody listens.
func (h *hub) idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs) == 0
}

func (h *hub) publish(e *process.ProcessEvent) {
	h.mu.Lock()
	subs := h.subs
	h.mu.Unlock()
	for _, s := range subs {
		s.send(e)
	}
}

// close publishes the last event. No publish may be under way or follow.
func (h *hub) close(end *process.ProcessEvent) {
	h.mu.Lock()
	subs := h.subs
	h.closed, h.subs = true, nil
	h.mu.Unlock()
	for _, s := range subs {
		s.send(end)
		close(s.events)
	}
}

func (s *subscriber) send(e *process.ProcessEvent) {
	select {
	case s.events <- e:
	case <-s.gone:
	}
}
