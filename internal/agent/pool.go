package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// poolKey says what a warm sandbox can be claimed for.
type poolKey struct {
	digest string
	size   sandbox.Resources
	// checkpoint is what it goes on from; empty for one that is started from its image.
	checkpoint string
}

// keyOf returns what a sandbox was made from.
func keyOf(r *journal.Record) poolKey { return poolKey{r.ImageDigest, r.Resources, r.Source} }

// pool is the warm sandboxes of one key. Agent.mu guards it.
type pool struct {
	template sandbox.TemplateID // that asked for it last
	name     string             // by which it was asked for
	ready    []*instance        // oldest first
	filling  int
	custom   bool // it gets no more than what is asked for again and again: the size, or the checkpoint, is somebody's own
	stale    bool // nobody will ask for it: the template is gone or has changed
	use      usage
	retryAt  time.Time // no filling before
	tries    int
}

var errGivenBack = errors.New("a warm sandbox gave way")

// poolFor returns the pool of a key, and makes it where it is missing.
//
// Preconditions: a.mu is held.
func (a *Agent) poolFor(k poolKey) *pool {
	p := a.pools[k]
	if p == nil {
		p = &pool{}
		a.pools[k] = p
	}
	return p
}

// demand notes that somebody wants a sandbox of the order's kind.
func (a *Agent) demand(o *order) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.poolFor(o.pool)
	p.template, p.name, p.stale = o.template, o.name, false
	p.custom = o.custom || o.from.SandboxID != ""
	p.use = p.use.add(now())
	for k, other := range a.pools {
		if k.checkpoint == "" && o.from.SandboxID != "" {
			continue // a fork is asked for by its source's names, and says nothing about them
		}
		moved := k.digest != o.pool.digest || k.checkpoint != o.pool.checkpoint
		other.stale = other.stale || moved && other.template == o.template && other.name == o.name
	}
}

// outdate marks pools of which nobody will ask for a sandbox any more.
func (a *Agent) outdate(which func(k poolKey, p *pool) bool) {
	a.mu.Lock()
	for k, p := range a.pools {
		p.stale = p.stale || which(k, p)
	}
	a.mu.Unlock()
	a.poke()
}

// takeWarm takes a warm sandbox out of its pool, with op held; nil when there is none.
func (a *Agent) takeWarm(k poolKey) *instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.pools[k]
	if p == nil {
		return nil
	}
	return p.take()
}

// take takes the sandbox that has been ready for longest and that nobody works on.
//
// Preconditions: Agent.mu is held.
func (p *pool) take() *instance {
	for i, in := range p.ready {
		if in.tryLock() { // op before mu, but this does not wait
			p.ready = slices.Delete(p.ready, i, i+1)
			return in
		}
	}
	return nil
}

// forgetWarm takes an instance out of its pool, if it is in one.
func (a *Agent) forgetWarm(in *instance) {
	r := in.record()
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pools[keyOf(&r)]; p != nil {
		p.ready = slices.DeleteFunc(p.ready, func(o *instance) bool { return o == in })
	}
}

// giveBackOne ends a warm sandbox to make room, or one that is being made. It reports false when all of them together
// would not make enough.
func (a *Agent) giveBackOne(ctx context.Context, ask sandbox.Resources) bool {
	if !a.journal.FitsWithoutWarm(ask) {
		return false
	}
	if a.journal.Ledger().Warm.Sandboxes == 0 {
		return true // it fits: somebody else made room meanwhile
	}
	if in := a.leastWanted(); in != nil {
		a.abandon(ctx, in)
		return true
	}
	for _, in := range a.instances() {
		if !in.record().Warm {
			continue
		}
		in.interrupt(errGivenBack)
		if in.lock(ctx) != nil {
			return false
		}
		if r := in.record(); r.Warm {
			a.forgetWarm(in)
			a.abandon(ctx, in)
		} else {
			a.release(in) // claimed meanwhile
		}
		return true
	}
	return pause(ctx, time.Millisecond) // there is one, but it is not known here yet
}

// leastWanted takes a warm sandbox from the pool that was used least lately, with op held.
func (a *Agent) leastWanted() *instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	pools := make([]*pool, 0, len(a.pools))
	for _, p := range a.pools {
		if len(p.ready) > 0 {
			pools = append(pools, p)
		}
	}
	slices.SortFunc(pools, func(x, y *pool) int { return x.use.last.Compare(y.use.last) })
	for _, p := range pools {
		if in := p.take(); in != nil {
			return in
		}
	}
	return nil
}

// fillOne makes one warm sandbox. The caller has counted it in the pool's filling.
func (a *Agent) fillOne(ctx context.Context, k poolKey) {
	in, err := a.makeWarm(ctx, k)
	vain := err != nil && !a.startable(k)
	a.mu.Lock()
	p := a.poolFor(k)
	p.filling--
	p.stale = p.stale || vain
	switch {
	case err == nil:
		p.tries = 0
		p.ready = append(p.ready, in)
	case errors.Is(err, errGivenBack) || ctx.Err() != nil || errors.Is(err, sandbox.ErrExhausted):
		p.retryAt = now().Add(time.Second)
	default:
		p.retryAt = now().Add(backoff(p.tries + 3))
		p.tries++
	}
	a.mu.Unlock()
	if err == nil {
		a.release(in)
		if !in.alive() {
			a.forgetWarm(in) // it ended before it was in the pool
		}
		return
	}
	a.poke()
	if vain || ctx.Err() != nil || errors.Is(err, sandbox.ErrExhausted) {
		return // the template is gone, the node shuts down, or others need the room
	}
	a.log.WarnContext(ctx, "warm sandbox not made", slog.String("image", k.digest), slog.Any("err", err))
}

// makeWarm makes a sandbox that waits to be claimed, and returns it with op held.
func (a *Agent) makeWarm(ctx context.Context, k poolKey) (*instance, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.CreateTimeout)
	defer cancel()
	from, err := a.sourceOf(k)
	if err != nil {
		return nil, err
	}
	r := a.newRecord(k, &from)
	r.Warm = true
	in, err := a.admit(ctx, &r)
	if err != nil {
		return nil, err
	}
	if err := a.warmUp(ctx, in); err != nil {
		a.abandon(ctx, in)
		return nil, err
	}
	return in, nil
}

// startable reports whether there is what a pool's sandboxes are made from.
func (a *Agent) startable(k poolKey) bool {
	if _, err := a.images.Path(k.digest); isNotFound(err) {
		return false
	}
	_, err := a.sourceOf(k)
	return !isNotFound(err)
}

func (a *Agent) warmUp(ctx context.Context, in *instance) error {
	ctx, done := in.interruptible(ctx)
	defer done()
	if err := a.gate.enter(ctx, true); err != nil {
		return err
	}
	defer a.gate.leave()
	g, err := a.boot(ctx, in)
	if err != nil {
		return err
	}
	in.keepGuest(g)
	return a.putReady(ctx, in)
}

func (a *Agent) putReady(ctx context.Context, in *instance) error {
	r := in.record()
	r.Ready = true
	r.Append(journal.Line{Time: now(), Level: "info", Message: "sandbox made ahead of demand"})
	return a.put(ctx, in, r)
}
