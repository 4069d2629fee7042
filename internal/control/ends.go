package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// endsAtOnce is how many ends one node carries out at once, so that creates there are not starved.
	endsAtOnce = 16
	// calmPace is the least time between two looks at whether every proxy has reported: many may at once.
	calmPace = time.Millisecond
)

// endings is what is known, beside the index and what proxies report, for the decision about sandboxes' ends. Its mutex comes
// after all others.
type endings struct {
	// ask has the proxy of this process report at once.
	ask chan struct{}

	mu sync.Mutex
	// leading means that this server decides. What was used before since may not be known here.
	leading bool
	since   time.Time
	// used are the last uses that no proxy reports any more, or that nodes reported; working what nodes last said is in use.
	used    map[sandbox.ID]time.Time
	working map[sandbox.NodeID]map[sandbox.ID]struct{}
	slots   map[sandbox.NodeID]chan struct{}
}

func newEndings() *endings {
	return &endings{
		ask: make(chan struct{}, 1), since: time.Now(), used: make(map[sandbox.ID]time.Time),
		working: make(map[sandbox.NodeID]map[sandbox.ID]struct{}), slots: make(map[sandbox.NodeID]chan struct{}),
	}
}

// keep keeps what proxies reported that are forgotten, and forgets sandboxes that are not known any more.
func (e *endings) keep(past []sandbox.Activity, known func(sandbox.ID) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, u := range past {
		if u.Last.After(e.used[u.ID]) {
			e.used[u.ID] = u.Last
		}
	}
	for id := range e.used {
		if !known(id) {
			delete(e.used, id)
		}
	}
}

// busy takes what a node says is in use.
func (e *endings) busy(node sandbox.NodeID, ids []string, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(ids) == 0 {
		delete(e.working, node)
		return
	}
	set := make(map[sandbox.ID]struct{}, len(ids))
	for _, id := range ids {
		set[sandbox.ID(id)] = struct{}{}
		e.used[sandbox.ID(id)] = now
	}
	e.working[node] = set
}

// of returns when a sandbox was last used as far as no proxy says, and whether it works now.
func (e *endings) of(b *sandbox.Sandbox) (last time.Time, working bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, working = e.working[b.NodeID][b.ID]
	if last = e.used[b.ID]; last.Before(e.since) {
		last = e.since
	}
	return last, working
}

// slot waits until a node may carry out one more end.
func (e *endings) slot(ctx context.Context, node sandbox.NodeID) (release func(), err error) {
	e.mu.Lock()
	at := e.slots[node]
	if at == nil {
		at = make(chan struct{}, endsAtOnce)
		e.slots[node] = at
	}
	e.mu.Unlock()
	select {
	case at <- struct{}{}:
		return func() { <-at }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Due is a sandbox whose end is to be decided about, with what is known of its use.
type Due struct {
	Sandbox sandbox.Sandbox
	// Open counts the requests that are open, Last is when it was last used, and Working means that its processes use the
	// processor or somebody on its node is connected.
	Open    int
	Last    time.Time
	Working bool
	// Complete means that no proxy could know more; Known that the node has reported all its sandboxes and goes on reporting.
	Complete, Known bool
}

// LeadEnds notes whether this server decides about the ends of sandboxes. While it does, nodes leave them to it.
func (c *Control) LeadEnds(leading bool) {
	c.ends.mu.Lock()
	defer c.ends.mu.Unlock()
	if c.ends.leading = leading; leading {
		c.ends.since = time.Now()
	}
}

// decides returns for how long nodes may leave ends to this server, as they are told with each report.
func (c *Control) decides() *durationpb.Duration {
	c.ends.mu.Lock()
	defer c.ends.mu.Unlock()
	if !c.ends.leading {
		return nil
	}
	return durationpb.New(c.limits.SuspectAfter)
}

// FollowEnds calls f with every sandbox that is known, and from then on with each that is new or another. f must not block
// or call c.
func (c *Control) FollowEnds(f func(*sandbox.Sandbox)) {
	c.index.mu.Lock()
	defer c.index.mu.Unlock()
	c.index.observe = f
	for _, e := range c.index.byID {
		f(&e.box)
	}
}

// Due returns what is known of a sandbox now; false where nothing is.
func (c *Control) Due(id sandbox.ID) (Due, bool) {
	box, ok := c.index.get(id)
	if !ok {
		return Due{}, false
	}
	d := Due{Sandbox: box, Known: c.fleet.hears(box.NodeID)}
	d.Open, d.Last, d.Complete = c.Activity(id)
	last, working := c.ends.of(&box)
	if last.After(d.Last) {
		d.Last = last
	}
	d.Working = working
	return d, true
}

// hears reports whether a node has said what it runs and goes on reporting.
func (f *fleet) hears(id sandbox.NodeID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	return m != nil && m.told && m.state == sandbox.NodeReady
}

// slide sets the end of a running sandbox that moves with its use to what it is as of now.
func (c *Control) slide(b *sandbox.Sandbox, now time.Time) {
	if b.State != sandbox.StateRunning || !b.IdleTimeout || b.EndAt.IsZero() {
		return
	}
	d, _ := c.Due(b.ID)
	if d.Open > 0 || d.Working {
		d.Last = now
	}
	b.EndAt = b.EndAfter(d.Last)
}

// Decision is what is decided about the end of a sandbox.
type Decision struct {
	ID         sandbox.ID
	Generation int64
	Reason     string
	// Forced means that requests may be open: its end is fixed, and they had their time.
	Forced bool
}

// EndDue ends a sandbox whose time is up. Errors: ErrNotFound, ErrConflict where it is not as it was when that was decided,
// is used after all or is being moved, ErrUnavailable.
func (c *Control) EndDue(ctx context.Context, d Decision) error {
	return c.conclude(ctx, d, func(ctx context.Context, h held) error {
		_, err := h.agent.Kill(ctx, &agentv1.KillRequest{Id: string(d.ID), Reason: d.Reason, Generation: d.Generation, TimedOut: true})
		if err == nil {
			c.buried(d.ID, d.Reason)
			c.strays.ended(d.ID)
		}
		return err
	})
}

// PauseDue pauses a sandbox whose time is up. Errors: those of EndDue.
func (c *Control) PauseDue(ctx context.Context, d Decision) error {
	return c.conclude(ctx, d, func(ctx context.Context, h held) error {
		keep, err := kindToWire(h.box.AutoPauseKind)
		if err != nil {
			return err
		}
		resp, err := h.agent.Pause(ctx, &agentv1.PauseRequest{Id: string(d.ID), Kind: keep, Generation: d.Generation, TimedOut: true})
		if err != nil {
			return err
		}
		c.fleet.answered(h.box.NodeID, resp.GetLoad())
		_, err = c.learn(h.box.NodeID, resp.GetSandbox())
		return err
	})
}

// conclude has a node do what is decided, unless the sandbox is another by now or somebody uses it. While it is made sure of
// that, and until the node has answered, proxies hold back new requests.
func (c *Control) conclude(ctx context.Context, d Decision, command func(context.Context, held) error) error {
	release, ok := c.busy.try(d.ID)
	if !ok {
		return sandbox.Conflictf("sandbox %s is being moved", d.ID)
	}
	defer release()
	box, ok := c.index.get(d.ID)
	switch {
	case !ok || box.State.Ended():
		return unknown(d.ID)
	case box.Generation != d.Generation || box.State != sandbox.StateRunning:
		return sandbox.Conflictf("sandbox %s has generation %d and is %s: generation %d was to end", d.ID, box.Generation, box.State, d.Generation)
	}
	agent, err := c.agent(box.NodeID)
	if err != nil {
		return err
	}
	h := held{box: box, agent: agent}
	if !d.Forced {
		defer c.heldBack(h, d.Reason)()
		if err := c.calm(ctx, box); err != nil {
			return err
		}
	}
	free, err := c.ends.slot(ctx, box.NodeID)
	if err != nil {
		return fmt.Errorf("wait for node %s: %w", box.NodeID, err)
	}
	defer free()
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	err = fromNode(box.NodeID, command(ctx, h))
	if errors.Is(err, sandbox.ErrConflict) {
		_, lookErr := c.look(ctx, h) // what it is by now
		err = errors.Join(err, lookErr)
	}
	return err
}

// heldBack has requests wait for a sandbox, until the returned function is called or the node says more.
func (c *Control) heldBack(h held, reason string) (done func()) {
	turn := func(from, to sandbox.State, why string) {
		c.index.change(h.box.ID, time.Now(), func(e *entry) bool {
			if e.box.State != from || e.box.Generation != h.box.Generation {
				return false
			}
			e.box.State, e.box.Reason = to, why
			return true
		})
	}
	turn(sandbox.StateRunning, sandbox.StatePausing, reason)
	return func() { turn(sandbox.StatePausing, sandbox.StateRunning, "") }
}

// calm returns nil once every proxy holds back new requests for a sandbox and has reported after that, and none is open.
// Proxies that have joined report at once where they hear that a sandbox is to pause. Errors: ErrConflict where it is in use,
// ErrUnavailable where a proxy does not report in time.
func (c *Control) calm(ctx context.Context, box sandbox.Sandbox) error {
	began, version := time.Now(), c.routes.now()
	ctx, cancel := context.WithTimeout(ctx, reportWithin)
	defer cancel()
	for {
		news := c.activity.news()
		local, all := c.activity.allSince(began, c.routes.table, version)
		if all {
			break
		}
		if !local {
			select {
			case c.ends.ask <- struct{}{}:
			default:
			}
		}
		select {
		case <-news:
			pause(ctx, calmPace)
		case <-ctx.Done():
			return sandbox.Unavailablef("sandbox %s: not every proxy has said whether it is in use", box.ID)
		}
		if open, _, _ := c.Activity(box.ID); open > 0 {
			break // whoever waits goes on at once
		}
	}
	d, _ := c.Due(box.ID)
	if d.Open > 0 || box.IdleTimeout && (d.Working || box.EndAfter(d.Last).After(time.Now())) {
		return sandbox.Conflictf("sandbox %s is in use", box.ID)
	}
	return nil
}

// allSince reports whether every proxy that is there has reported after a moment, and follows the routes up to a version; local
// does of that of this process, which reads the index itself.
func (a *activity) allSince(moment time.Time, table string, version int64) (local, all bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	local, all = true, true
	for id, p := range a.proxies {
		switch {
		case id == localProxy:
			local = p.asOf.After(moment)
		case !p.expected() && time.Since(p.heard) > reportWithin:
		case p.heard.After(moment) && p.self.table == table && p.self.at >= version:
		default:
			all = false
		}
	}
	for _, l := range a.listed {
		all = all && (l.id != "" || l.away)
	}
	return local, local && all
}
