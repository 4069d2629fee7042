package agent

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// How the pool follows demand.
const (
	// useHalfLife is the time in which past demand counts half.
	useHalfLife = 10 * time.Second
	// fillQuiet is how long nobody has to ask before a pool that is still half full is filled: whoever just got a sandbox
	// wants the processor for it.
	fillQuiet = 150 * time.Millisecond
	// planEvery bounds how old the plan's view of the machine's memory gets while there are pools.
	planEvery = 5 * time.Second
)

// State is what the plan is made from: a snapshot of the node.
type State struct {
	Sandboxes []SandboxState
	Pools     []PoolState
	// Room is what is not allocated.
	Room sandbox.Resources
	// Decided is until when a server sees to the ends of sandboxes.
	Decided time.Time
	// Acknowledged is the last change that the server has.
	Acknowledged int64
	// Waiting counts creates that wait for their turn.
	Waiting int
	// Filling counts sandboxes that are being made for pools, MaxFilling is how many may be.
	Filling, MaxFilling int
	// Pressure means that the machine is short of memory.
	Pressure bool
	// Cordoned means that the node gets no new sandboxes.
	Cordoned bool

	WarmMin, WarmMax   int
	WarmKeep, WarmIdle time.Duration
	Retention          time.Duration
	// Garbage are the images that no template needs.
	Garbage []GarbageState
}

// GarbageState is one image that no template needs.
type GarbageState struct {
	Digest string
	// Used means that a sandbox or checkpoint needs it, or that somebody deletes it.
	Used    bool
	RetryAt time.Time
}

// SandboxState is one sandbox in a State.
type SandboxState struct {
	ID    sandbox.ID
	State sandbox.State
	// Busy means that somebody works on it; it is left alone until that is done.
	Busy  bool
	Warm  bool
	Ready bool
	// Build means that a build uses it, which ends it.
	Build bool
	// AutoPause means that it is paused when its time is up.
	AutoPause bool
	// Left means that it is paused or migrating and something of its guest may be left.
	Left bool
	// Deadline is of a migrating one: when the server is to be reminded of it.
	Deadline time.Time
	EndAt    time.Time
	// AtOnce means that somebody wants the end to come at once.
	AtOnce bool
	// Idle means that the end comes Timeout after the last use; UsedAt is when that was as far as the node knows, and Open
	// means that it goes on.
	Idle    bool
	Open    bool
	Timeout time.Duration
	UsedAt  time.Time
	EndedAt time.Time
	RetryAt time.Time
	// Sequence is the number of its last change; 0 when there was none.
	Sequence int64
}

// PoolState is one pool in a State.
type PoolState struct {
	Key poolKey
	// Ready are the sandboxes that can be given back, oldest first.
	Ready   []sandbox.ID
	Filling int
	Use     usage
	// Custom means that the size is not the template's: it gets no more than what is asked for again and again.
	Custom bool
	// Stale means that the template has a newer image.
	Stale   bool
	RetryAt time.Time
}

// Action is one thing to do.
type Action struct {
	Kind ActionKind
	ID   sandbox.ID // for all but ActionFill and ActionClosePool
	Pool poolKey    // for ActionFill and ActionClosePool
	// Image is for ActionFreeImage.
	Image string
}

// ActionKind is what an Action does.
type ActionKind string

// The actions.
const (
	// ActionExpire ends a sandbox whose time is up.
	ActionExpire ActionKind = "expire"
	// ActionPause pauses a sandbox whose time is up.
	ActionPause ActionKind = "pause"
	// ActionRetry tries again to end or clear away a sandbox.
	ActionRetry ActionKind = "retry"
	// ActionForget deletes the record of an ended sandbox.
	ActionForget ActionKind = "forget"
	// ActionFill makes a warm sandbox.
	ActionFill ActionKind = "fill"
	// ActionGiveBack ends a warm sandbox.
	ActionGiveBack ActionKind = "give_back"
	// ActionClosePool forgets a pool that is empty and not used.
	ActionClosePool ActionKind = "close_pool"
	// ActionFreeImage deletes an image that nothing needs.
	ActionFreeImage ActionKind = "free_image"
)

// Plan says what is to be done now, and when to ask again if nothing happens before; zero means never.
func Plan(s *State, now time.Time) (actions []Action, next time.Time) {
	p := planner{state: s, now: now}
	for i := range s.Sandboxes {
		p.sandbox(&s.Sandboxes[i])
	}
	p.pools()
	for i := range s.Garbage {
		if g := &s.Garbage[i]; !g.Used && p.due(g.RetryAt) {
			p.actions = append(p.actions, Action{Kind: ActionFreeImage, Image: g.Digest})
		}
	}
	return p.actions, p.next
}

type planner struct {
	state   *State
	now     time.Time
	actions []Action
	next    time.Time
}

// due reports whether t has come, and otherwise has the plan looked at again then.
func (p *planner) due(t time.Time) bool {
	if !t.After(p.now) {
		return true
	}
	if p.next.IsZero() || t.Before(p.next) {
		p.next = t
	}
	return false
}

func (p *planner) do(kind ActionKind, id sandbox.ID) {
	p.actions = append(p.actions, Action{Kind: kind, ID: id})
}

func (p *planner) sandbox(b *SandboxState) {
	switch {
	case b.Busy:
	case b.State.Ended():
		if b.Sequence <= p.state.Acknowledged && p.due(b.EndedAt.Add(p.state.Retention)) {
			p.do(ActionForget, b.ID)
		}
	case b.State == sandbox.StateCreating && (b.Build || b.Warm && b.Ready):
	case b.State == sandbox.StatePaused && !b.Left:
	case b.State == sandbox.StateMigrating && !b.Left: // whoever moves it decides
		if p.due(b.Deadline) && p.due(b.RetryAt) {
			p.do(ActionRetry, b.ID)
		}
	case b.State != sandbox.StateRunning: // somebody was to make it something else
		if p.due(b.RetryAt) {
			p.do(ActionRetry, b.ID)
		}
	case b.EndAt.IsZero() || !p.due(p.ownEnd(b)):
	case b.AutoPause:
		if p.due(b.RetryAt) {
			p.do(ActionPause, b.ID)
		}
	default:
		p.do(ActionExpire, b.ID)
	}
}

// target is how many warm sandboxes a pool should have.
func (p *planner) target(l *PoolState) int {
	s := p.state
	if s.Pressure || s.Cordoned || l.Stale || !l.Use.last.Add(s.WarmKeep).After(p.now) {
		return 0
	}
	use := int(math.Ceil(l.Use.at(p.now)))
	if l.Custom {
		return max(0, min(s.WarmMax, use-1))
	}
	return max(s.WarmMin, min(s.WarmMax, use))
}

func (p *planner) pools() {
	if len(p.state.Pools) == 0 {
		return
	}
	p.due(p.now.Add(planEvery))
	// What was asked for last comes first.
	order := slices.SortedFunc(slices.Values(p.state.Pools), func(x, y PoolState) int {
		return cmp.Or(y.Use.last.Compare(x.Use.last), cmp.Compare(x.Key.digest, y.Key.digest))
	})
	room, filling := p.state.Room, p.state.Filling
	for i := range order {
		l := &order[i]
		target := p.target(l)
		p.shrink(l, target)
		if len(l.Ready)+l.Filling == 0 && target == 0 && !p.remembered(l) {
			p.actions = append(p.actions, Action{Kind: ActionClosePool, Pool: l.Key})
			continue
		}
		for n := len(l.Ready) + l.Filling; n < target && p.mayFill(l, filling, target) && l.Key.size.Fits(room); n++ {
			p.actions = append(p.actions, Action{Kind: ActionFill, Pool: l.Key})
			room = room.Sub(l.Key.size)
			filling++
		}
	}
}

// remembered reports whether a pool that keeps nothing still counts how often its size is asked for.
func (p *planner) remembered(l *PoolState) bool {
	return l.Custom && !l.Stale && l.Use.at(p.now) > 0.25
}

// shrink gives back what a pool has beyond its target: at once when it should have none, else when it is idle.
func (p *planner) shrink(l *PoolState, target int) {
	surplus := len(l.Ready) - target
	if surplus <= 0 || target > 0 && !p.due(l.Use.last.Add(p.state.WarmIdle)) {
		return
	}
	for _, id := range l.Ready[:surplus] {
		p.do(ActionGiveBack, id)
	}
}

func (p *planner) mayFill(l *PoolState, filling, target int) bool {
	switch {
	case p.state.Waiting > 0, filling >= p.state.MaxFilling:
		return false // the end of what is under way wakes the loop
	case !p.due(l.RetryAt):
		return false
	case 2*len(l.Ready) >= target && !p.due(l.Use.last.Add(fillQuiet)):
		return false
	}
	return true
}

// usage is how much a pool is asked for, with the past counting less and less.
type usage struct {
	last   time.Time
	weight float64
}

// at returns the weight as of t.
func (u usage) at(t time.Time) float64 {
	if u.weight == 0 {
		return 0
	}
	return u.weight * math.Exp2(-float64(t.Sub(u.last))/float64(useHalfLife))
}

// add counts one more at t.
func (u usage) add(t time.Time) usage { return usage{last: t, weight: u.at(t) + 1} }
