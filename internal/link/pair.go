package link

import (
	"context"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// bulkWait bounds how long a stream waits for the bulk connection of a link that is up: it is dialed after the control
// connection, and again where it breaks.
const bulkWait = 2 * time.Second

// pair is one life of a link: its two connections.
type pair struct {
	mu            sync.Mutex
	control, bulk *session // nil until they are there
	over          bool     // neither will be there any more
	// changed is closed when a field changes; nil where nobody waits.
	changed chan struct{}
}

// setControl gives the link its control connection; false where the link is over.
func (p *pair) setControl(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		p.control = s
		p.tellLocked()
	}
	return !p.over
}

// setBulk puts a bulk connection in the place of the present one; false where the link is over.
func (p *pair) setBulk(s *session) bool {
	p.mu.Lock()
	old, over := p.bulk, p.over
	if !over {
		p.bulk = s
		p.tellLocked()
	}
	p.mu.Unlock()
	if old != nil && !over {
		old.close()
	}
	return !over
}

// lostBulk takes a bulk connection out that has ended.
func (p *pair) lostBulk(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bulk == s {
		p.bulk = nil
	}
}

// end closes both connections.
func (p *pair) end() {
	p.mu.Lock()
	control, bulk := p.control, p.bulk
	p.over = true
	p.tellLocked()
	p.mu.Unlock()
	for _, s := range []*session{control, bulk} {
		if s != nil {
			s.close()
		}
	}
}

func (p *pair) tellLocked() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// get returns what carries streams of a kind, and what tells of changes where that is not there.
func (p *pair) get(k Kind) (s *session, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s = p.bulk
	if k == RPC {
		s = p.control
	}
	if s != nil && !s.yamux.IsClosed() {
		return s, nil
	}
	if k == RPC || p.over || p.control == nil {
		return nil, nil
	}
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return nil, p.changed
}

// live reports whether the link is up.
func (p *pair) live() bool {
	s, _ := p.get(RPC)
	return s != nil
}

// session returns what carries streams of a kind; a bulk connection that is on its way is waited for. Errors: ErrUnavailable.
func (p *pair) session(ctx context.Context, k Kind) (*session, error) {
	timer := time.NewTimer(bulkWait)
	defer timer.Stop()
	for {
		s, changed := p.get(k)
		if s != nil {
			return s, nil
		}
		if changed == nil {
			return nil, sandbox.Unavailablef("the link is not up")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-timer.C:
			return nil, sandbox.Unavailablef("the link has no connection for %s streams now", k)
		}
	}
}
