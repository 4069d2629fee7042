package control

import (
	"maps"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// copyOf names what one node has of a sandbox.
type copyOf struct {
	id   sandbox.ID
	node sandbox.NodeID
}

// stray is a copy of a sandbox that does not count, or of which that is not decided.
type stray struct {
	box   sandbox.Sandbox
	since time.Time
}

// strays are the copies that runSettle has to do something about, as the nodes reported them.
type strays struct {
	wake chan struct{}

	mu     sync.Mutex
	copies map[copyOf]stray
	// over are sandboxes that ended, whose records may go.
	over map[sandbox.ID]struct{}
	// doubted are sandboxes of the node of this process of which it is not certain that it still has them.
	doubted map[copyOf]struct{}
}

func newStrays() *strays {
	return &strays{
		wake: make(chan struct{}, 1), copies: make(map[copyOf]stray), over: make(map[sandbox.ID]struct{}), doubted: make(map[copyOf]struct{}),
	}
}

// kick has runSettle look now.
func (s *strays) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *strays) add(box sandbox.Sandbox, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := copyOf{box.ID, box.NodeID}
	if old, ok := s.copies[at]; ok {
		now = old.since
	}
	s.copies[at] = stray{box: box, since: now}
}

func (s *strays) resolve(id sandbox.ID, node sandbox.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.copies, copyOf{id, node})
}

// doubt has runSettle ask a node whether it still has a sandbox.
func (s *strays) doubt(id sandbox.ID, node sandbox.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doubted[copyOf{id, node}] = struct{}{}
}

// ended notes that a sandbox is no more.
func (s *strays) ended(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over[id] = struct{}{}
}

// onlyNamed drops the copies of a node that it did not name in a full report.
func (s *strays) onlyNamed(node sandbox.NodeID, named map[sandbox.ID]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.copies, func(at copyOf, _ stray) bool {
		_, ok := named[at.id]
		return at.node == node && !ok
	})
}

// bySandbox returns the copies of each sandbox.
func (s *strays) bySandbox() map[sandbox.ID][]stray {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[sandbox.ID][]stray, len(s.copies))
	for at, one := range s.copies {
		out[at.id] = append(out[at.id], one)
	}
	return out
}

// of returns the copies of one sandbox.
func (s *strays) of(id sandbox.ID) []stray {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []stray
	for at, one := range s.copies {
		if at.id == id {
			out = append(out, one)
		}
	}
	return out
}

// takeEnds returns what ended and what was doubted since the last call.
func (s *strays) takeEnds() (over map[sandbox.ID]struct{}, doubted map[copyOf]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	over, doubted = s.over, s.doubted
	s.over, s.doubted = make(map[sandbox.ID]struct{}), make(map[copyOf]struct{})
	return over, doubted
}
