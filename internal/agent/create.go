package agent

import (
	"context"
	"errors"
	"log/slog"
	"syscall"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// Create admits, starts and returns a running sandbox.
func (a *Agent) Create(ctx context.Context, req *agentv1.CreateRequest) (*agentv1.CreateResponse, error) {
	began := time.Now()
	a.followClock(ctx)
	o, err := fromWireCreate(req)
	if err != nil {
		a.metrics.created("", err, began)
		return nil, toWireError(err)
	}
	if a.secret.Load() == nil {
		err := sandbox.Unavailablef("node %s is not registered with a server yet: try again in a moment", a.node)
		a.metrics.created("", err, began)
		return nil, toWireError(err)
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.CreateTimeout)
	defer cancel()
	in, path, err := a.createOnce(ctx, o)
	if errors.Is(err, syscall.ENOSPC) {
		err = sandbox.Unavailablef("the disk of node %s is full: once there is room again, it goes on by itself (%v)", a.node, err)
	}
	a.metrics.created(path, err, began)
	if err != nil {
		a.log.WarnContext(ctx, "sandbox not created", slog.String("op", "create"), slog.String("template_id", string(o.template)),
			slog.Duration("after", time.Since(began)), slog.Any("err", err))
		return nil, toWireError(err)
	}
	r := in.record()
	a.log.InfoContext(ctx, "sandbox created", slog.String("op", "create"), slog.String("sandbox_id", string(in.id)),
		slog.String("path", path), slog.Duration("after", time.Since(began)))
	return &agentv1.CreateResponse{Sandbox: toWireSandbox(&r.Sandbox), Load: a.load()}, nil
}

// The ways in which a sandbox came to be.
const (
	pathWarm    = "warm"
	pathCold    = "cold"
	pathEarlier = "earlier" // an idempotency key was used before
)

// flight is the one create with an idempotency key: under way, or done.
type flight struct {
	done chan struct{} // closed when in and err, which Agent.mu guards until then, are final
	in   *instance
	err  error
}

// createOnce creates, unless the order's idempotency key was used before: then it returns what that create made.
func (a *Agent) createOnce(ctx context.Context, o *order) (*instance, string, error) {
	err := a.obtain(ctx, o)
	if err != nil {
		return nil, "", err
	}
	if o.from, err = a.sourceOf(o.pool); err != nil {
		return nil, "", err
	}
	if o.key == "" {
		return a.create(ctx, o)
	}
	for {
		f, mine := a.join(o.key)
		if mine {
			in, path, err := a.create(ctx, o)
			a.mu.Lock()
			f.in, f.err = in, err
			if err != nil {
				delete(a.byKey, o.key)
			}
			a.mu.Unlock()
			close(f.done)
			return in, path, err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, pathEarlier, ctx.Err()
		}
		if f.err != nil {
			continue // that one failed, perhaps because its caller left
		}
		if r := f.in.record(); r.State.Ended() || r.State == sandbox.StateStopping {
			return nil, pathEarlier, sandbox.Conflictf("sandbox %s, which was made with this idempotency key, has ended: %s", r.ID, ending(&r))
		}
		return f.in, pathEarlier, nil
	}
}

// join returns the create with the key, and whether it is the caller's to carry out.
func (a *Agent) join(key string) (f *flight, mine bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if f := a.byKey[key]; f != nil {
		return f, false
	}
	f = &flight{done: make(chan struct{})}
	a.byKey[key] = f
	return f, true
}

// create claims a warm sandbox where there is one, else starts one.
func (a *Agent) create(ctx context.Context, o *order) (*instance, string, error) {
	a.demand(o)
	for ctx.Err() == nil {
		in := a.takeWarm(o.pool)
		if in == nil {
			break
		}
		err := a.claim(ctx, in, o)
		if err == nil {
			a.release(in)
			return in, pathWarm, nil
		}
		a.log.WarnContext(ctx, "warm sandbox not usable", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
		a.abandon(ctx, in)
		if errors.Is(err, sandbox.ErrInvalid) {
			return nil, pathWarm, err
		}
	}
	in, err := a.coldStart(ctx, o)
	return in, pathCold, err
}

// claim makes a warm sandbox the order's. Nobody is told of it before the agent inside has its settings; should the
// process end in between, the record, which is no longer warm, sees to it that the sandbox is cleared away.
//
// Preconditions: the caller holds in.op, and the instance is in no pool.
func (a *Agent) claim(ctx context.Context, in *instance, o *order) error {
	if !in.alive() {
		return sandbox.Unavailablef("sandbox %s has ended", in.id)
	}
	r := in.record()
	o.fill(&r)
	r.Warm = false
	if err := a.put(ctx, in, r); err != nil {
		return err
	}
	ctx, done := in.interruptible(ctx)
	defer done()
	ctx, cancel := context.WithTimeout(ctx, a.cfg.ClaimTimeout)
	defer cancel()
	if !o.internet {
		if err := a.network.SetPolicy(ctx, in.id, guestnet.Policy{}); err != nil {
			return err
		}
	}
	if err := a.initGuest(ctx, in, in.takeGuest()); err != nil {
		return err
	}
	return a.started(ctx, in, o, "claimed from the warm pool")
}

// coldStart makes a sandbox from nothing.
func (a *Agent) coldStart(ctx context.Context, o *order) (*instance, error) {
	r := a.newRecord(o.pool, &o.from)
	o.fill(&r)
	in, err := a.admit(ctx, &r)
	if err != nil {
		return nil, err
	}
	if err := a.start(ctx, in, o); err != nil {
		a.abandon(ctx, in)
		return nil, err
	}
	a.release(in)
	return in, nil
}

// start takes an admitted sandbox to running.
//
// Preconditions: the caller holds in.op.
func (a *Agent) start(ctx context.Context, in *instance, o *order) error {
	ctx, done := in.interruptible(ctx)
	defer done()
	if err := a.gate.enter(ctx, false); err != nil {
		return err
	}
	defer a.gate.leave()
	g, err := a.boot(ctx, in)
	if err != nil {
		return err
	}
	if err := a.initGuest(ctx, in, g); err != nil {
		return err
	}
	return a.started(ctx, in, o, "started")
}

// started makes the sandbox known: from here on it is never lost without a report.
func (a *Agent) started(ctx context.Context, in *instance, o *order, how string) error {
	if !in.alive() {
		return sandbox.Unavailablef("sandbox %s ended while it was started", in.id)
	}
	r := in.record()
	r.StartedAt, r.EndAt = now(), time.Time{}
	created := journal.Change{Type: "created", Time: r.StartedAt, Sandbox: r.Sandbox}
	if o.timeout > 0 {
		r.EndAt = r.StartedAt.Add(o.timeout)
	}
	r.State, r.TokenOf = sandbox.StateRunning, ""
	r.Generation++
	r.Append(journal.Line{Time: r.StartedAt, Level: "info", Message: "sandbox " + how})
	return a.put(ctx, in, r, created, journal.Change{Type: "started", Time: r.StartedAt, Sandbox: r.Sandbox})
}

// newRecord is the record of a sandbox that nobody has ordered, from a checkpoint if there is one.
func (a *Agent) newRecord(k poolKey, from *snapshot.Manifest) journal.Record {
	r := journal.Record{
		Sandbox: sandbox.Sandbox{
			ID: sandbox.NewID(a.node), NodeID: a.node, State: sandbox.StateCreating, Generation: 1, Resources: k.size,
			StartedAt: now(), GuestVersion: a.cfg.GuestVersion, ImageDigest: k.digest,
		},
		Source: k.checkpoint,
	}
	if from.Secure && from.Kind == sandbox.CheckpointMemory {
		r.TokenOf, r.Secure = from.SandboxID, true
	}
	return r
}

// fill puts the order's wishes into a record.
func (o *order) fill(r *journal.Record) {
	r.TemplateID, r.TemplateName, r.Metadata = o.template, o.name, o.metadata
	r.AllowInternet, r.IdempotencyKey = o.internet, o.key
	r.AutoPause, r.AutoPauseKind, r.Guest = o.autoPause, o.autoPauseKind, o.guest
	r.AutoResume, r.Timeout, r.IdleTimeout = o.autoResume, o.timeout, o.idleTimeout
	// An agent that demands a token goes on demanding one.
	r.Secure = o.secure || r.TokenOf != ""
}

// admit writes a record if there is room for it, and returns its instance with op held. When only warm sandboxes are in
// the way of one that somebody waits for, they are given back.
func (a *Agent) admit(ctx context.Context, r *journal.Record) (*instance, error) {
	if r.Warm && a.short.Load() > 0 {
		return nil, sandbox.Exhaustedf("no room for warm sandboxes: others are waited for")
	}
	var in *instance
	try := func() error {
		got, earlier, err := a.journal.Admit(ctx, *r)
		switch {
		case err != nil:
			return err
		case earlier:
			return sandbox.Conflictf("the idempotency key was used for sandbox %s before", got.ID)
		}
		in = newInstance(&got)
		in.op <- struct{}{}
		a.mu.Lock()
		a.all[in.id] = in
		a.mu.Unlock()
		return nil
	}
	if r.Warm {
		err := try()
		return in, err
	}
	err := a.withRoom(ctx, r.Resources, try)
	return in, err
}

// withRoom tries what needs room; while there is none, warm sandboxes give way one by one.
func (a *Agent) withRoom(ctx context.Context, ask sandbox.Resources, try func() error) error {
	for pressed := false; ; {
		err := try()
		if !errors.Is(err, sandbox.ErrExhausted) {
			return err
		}
		if !pressed {
			pressed = true
			a.short.Add(1)
			defer a.short.Add(-1)
		}
		if !a.giveBackOne(ctx, ask) {
			return err
		}
	}
}
