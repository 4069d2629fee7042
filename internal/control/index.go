package control

import (
	"maps"
	"math"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// stretch is how many entries a scan looks at before it lets writers pass.
const stretch = 4096

// index is what the server knows of all sandboxes. It is rebuilt from the nodes' reports; nothing of it is stored.
//
// News about a sandbox counts if its generation is higher than the known one, or equal with a higher sequence number;
// so answers to commands and reports may arrive in any order. Ended sandboxes stay for a while: failed and lost ones
// are listed with their reason, deleted ones are only remembered, so that late news cannot bring them back.
type index struct {
	endedFor time.Duration
	endedMax int
	routes   *routeLog              // is told of every change
	observe  func(*sandbox.Sandbox) // likewise; nil: nobody. It is called under mu, which guards it

	mu     sync.RWMutex
	byID   map[sandbox.ID]*entry
	order  ordered // all but the deleted
	counts map[sandbox.State]int
	ended  []endedEntry // the oldest first
	paused map[sandbox.ID]struct{}
}

type endedEntry struct {
	entry *entry
	at    time.Time
}

func newIndex(endedFor time.Duration, endedMax int) *index {
	return &index{
		endedFor: endedFor, endedMax: endedMax,
		byID: make(map[sandbox.ID]*entry), counts: make(map[sandbox.State]int),
		paused: make(map[sandbox.ID]struct{}),
	}
}

// get returns what is known of a sandbox, a deleted one included.
func (x *index) get(id sandbox.ID) (sandbox.Sandbox, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	if !ok {
		return sandbox.Sandbox{}, false
	}
	return e.box, true
}

// madeUnder reports whether a node said of a sandbox, under a registration, that it has it.
func (x *index) madeUnder(id sandbox.ID, node sandbox.NodeID, epoch int64) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	return ok && e.box.NodeID == node && e.epoch == epoch && !e.box.State.Ended()
}

// isOver reports whether a sandbox is known to be no more.
func (x *index) isOver(id sandbox.ID) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	return ok && e.box.State == sandbox.StateDeleted
}

// isFinal reports whether a sandbox is no more, whatever its node says.
func (x *index) isFinal(id sandbox.ID) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	return ok && e.final
}

// has reports whether anything is known of a sandbox.
func (x *index) has(id sandbox.ID) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.byID[id] != nil
}

// apply takes news about a sandbox, unless newer news is known.
func (x *index) apply(e *entry, now time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if old := x.byID[e.box.ID]; old != nil && !newer(e, old) {
		return
	}
	x.replace(e, now)
}

func newer(e, old *entry) bool {
	switch {
	case old.final:
		return false
	case e.box.NodeID != old.box.NodeID: // the sequences of two nodes say nothing of each other
		return e.box.Generation > old.box.Generation
	case old.was != "": // the node itself knows better than what was concluded from its silence
		return e.box.Generation >= old.box.Generation
	}
	if e.box.Generation != old.box.Generation {
		return e.box.Generation > old.box.Generation
	}
	return e.sequence > old.sequence
}

// change replaces what is known of a sandbox by what f makes of it; f returns false to leave it. The server's own
// conclusions, such as a lost node, come this way: they keep the sequence, so that the node can still object.
func (x *index) change(id sandbox.ID, now time.Time, f func(e *entry) bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	old := x.byID[id]
	if old == nil {
		return
	}
	next := *old
	if f(&next) {
		x.replace(&next, now)
	}
}

// replace requires mu.
func (x *index) replace(e *entry, now time.Time) {
	if old := x.byID[e.box.ID]; old != nil {
		if old.box.State != sandbox.StateDeleted {
			x.counts[old.box.State]--
			if old.place() != e.place() || e.box.State == sandbox.StateDeleted {
				x.order.remove(old.place())
			}
		}
	}
	if e.box.State == sandbox.StateDeleted {
		e.box.Metadata = nil
	} else {
		x.order.put(e)
		x.counts[e.box.State]++
	}
	old := x.byID[e.box.ID]
	x.byID[e.box.ID] = e
	x.routes.changed(old, e)
	if x.observe != nil {
		x.observe(&e.box)
	}
	if e.box.State == sandbox.StatePaused {
		x.paused[e.box.ID] = struct{}{}
	} else {
		delete(x.paused, e.box.ID)
	}
	if e.box.State.Ended() && e.was == "" { // what was lost with its node stays as long as that may return
		x.ended = append(x.ended, endedEntry{entry: e, at: now})
		x.dropEnded(now)
	}
}

// prune forgets what ended too long ago.
func (x *index) prune(now time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.dropEnded(now)
}

// dropEnded requires mu.
func (x *index) dropEnded(now time.Time) {
	n := 0
	for n < len(x.ended) && (len(x.ended)-n > x.endedMax || now.Sub(x.ended[n].at) > x.endedFor) {
		x.forget(x.ended[n].entry)
		n++
	}
	clear(x.ended[:n])
	x.ended = x.ended[n:]
}

// forget requires mu.
func (x *index) forget(e *entry) {
	if x.byID[e.box.ID] != e {
		return // replaced meanwhile
	}
	delete(x.byID, e.box.ID)
	x.routes.note(e.box.ID)
	if e.box.State != sandbox.StateDeleted {
		x.order.remove(e.place())
		x.counts[e.box.State]--
	}
}

// scan calls f with every listed sandbox beyond from, in stretches, so that writers wait for no scan of everything;
// what changes meanwhile may or may not be seen. f must not keep or change the entry, and must not block.
func (x *index) scan(newestFirst bool, from place, f func(*entry) bool) {
	for goOn := true; goOn; {
		from, goOn = x.scanStretch(newestFirst, from, f)
	}
}

func (x *index) scanStretch(newestFirst bool, from place, f func(*entry) bool) (place, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	seen, wanted := 0, true
	var last *entry
	visit := func(e *entry) bool {
		seen++
		last = e
		wanted = f(e)
		return wanted && seen < stretch
	}
	if newestFirst {
		x.order.descend(from, visit)
	} else {
		x.order.ascend(from, visit)
	}
	if last != nil {
		from = last.place()
	}
	return from, wanted && seen == stretch
}

// ends returns the places before the first and after the last entry.
func ends() (first, last place) {
	return place{at: math.MinInt64}, place{at: math.MaxInt64, id: "\xff"}
}

// states returns how many sandboxes are in each state.
func (x *index) states() map[sandbox.State]int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return maps.Clone(x.counts)
}
