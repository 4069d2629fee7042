package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// recoverers is how many sandboxes are looked at in parallel after a start.
	recoverers = 16
	// adoptTimeout is how long the agent inside an adopted sandbox has for an answer.
	adoptTimeout = 2 * time.Second
)

// Recover brings records, guests, networks and images together after a start, however the process before ended: what
// runs is adopted, what died meanwhile is lost and will be reported, what was half-made is cleared away, and what no
// record names is ended. It must be called once, before Run and before any command.
func (a *Agent) Recover(ctx context.Context) error {
	if err := a.recoverImages(ctx); err != nil {
		return err
	}
	if err := a.files.recover(); err != nil {
		return err
	}
	if err := a.saves.Recover(ctx); err != nil {
		return fmt.Errorf("recover checkpoints: %w", err)
	}
	recs, err := a.journal.Records(ctx)
	if err != nil {
		return fmt.Errorf("recover sandboxes: %w", err)
	}
	guests, err := a.engine.List(ctx)
	if err != nil {
		return fmt.Errorf("recover sandboxes: list guests: %w", err)
	}
	unknown := map[sandbox.ID]engine.Guest{}
	for _, g := range guests {
		unknown[g.ID] = g
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(recoverers)
	for i := range recs {
		guest := unknown[recs[i].ID]
		delete(unknown, recs[i].ID)
		in := a.remember(&recs[i])
		g.Go(func() error { return a.recoverOne(gctx, in, guest.Running) })
	}
	for id := range unknown {
		g.Go(func() error {
			a.log.WarnContext(gctx, "guest without a record ended", slog.String("sandbox_id", string(id)))
			if err := a.engine.Stop(gctx, id); err != nil {
				return fmt.Errorf("end guest %s, which no record names: %w", id, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("recover sandboxes: %w", err)
	}
	if err := a.network.Sweep(ctx); err != nil {
		return fmt.Errorf("recover networks: %w", err)
	}
	if err := a.sweepCheckpoints(ctx); err != nil {
		return err
	}
	return a.sweepImages(ctx)
}

// sweepImages deletes those that a build had composed, or that had been fetched, when the process before ended, and that
// nothing names.
func (a *Agent) sweepImages(ctx context.Context) error {
	have, err := a.images.List(ctx)
	if err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	known, err := a.journal.Images(ctx)
	if err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	for i := range have {
		digest := have[i].Digest
		named := slices.ContainsFunc(known, func(k journal.Image) bool { return k.Digest == digest })
		if have[i].Base == "" && !have[i].Fetched || named || a.imageUsed(digest) {
			continue
		}
		a.log.InfoContext(ctx, "image that nothing names deleted", slog.String("image", digest))
		if err := a.images.Remove(ctx, digest); err != nil && !isNotFound(err) {
			return fmt.Errorf("recover images: %w", err)
		}
	}
	return nil
}

// sweepCheckpoints deletes those that sandboxes were to be paused in and are not. All others, and those that are
// kept of sandboxes of other nodes, belong to the server.
func (a *Agent) sweepCheckpoints(ctx context.Context) error {
	needed := map[string]bool{}
	for _, in := range a.instances() {
		needed[in.record().Checkpoint] = true
	}
	for _, m := range a.saves.List() {
		if !m.Pause || m.Replica || needed[m.ID] {
			continue
		}
		a.log.InfoContext(ctx, "checkpoint that no sandbox needs deleted", slog.String("checkpoint_id", m.ID))
		if err := a.saves.Remove(m.ID); err != nil {
			return fmt.Errorf("recover checkpoints: %w", err)
		}
	}
	return nil
}

// recoverImages makes the journal's images those that the machine has.
func (a *Agent) recoverImages(ctx context.Context) error {
	if err := a.images.Recover(ctx); err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	have, err := a.images.List(ctx)
	if err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	present := make(map[string]bool, len(have))
	for i := range have {
		present[have[i].Digest] = true
	}
	ims, err := a.journal.Images(ctx)
	if err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	for _, im := range ims {
		if !present[im.Digest] {
			a.log.WarnContext(ctx, "image is gone", slog.String("image", im.Digest), slog.String("template_id", string(im.TemplateID)))
			if err := a.journal.RemoveImage(ctx, im.Digest); err != nil {
				return err
			}
			continue
		}
		if im.Removed {
			a.garbage[im.Digest] = &garbage{}
		}
	}
	return nil
}

// remember makes the instance of a record, and what is in memory only because of it.
func (a *Agent) remember(r *journal.Record) *instance {
	in := newInstance(r)
	pooled := a.cfg.WarmMax > 0 && r.BuildID == "" && a.startable(keyOf(r))
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all[in.id] = in
	if r.IdempotencyKey != "" && r.State != sandbox.StateCreating {
		done := make(chan struct{})
		close(done)
		a.byKey[r.IdempotencyKey] = &flight{done: done, in: in}
	}
	if pooled {
		key := keyOf(r)
		_, known := a.pools[key]
		p := a.poolFor(key)
		// Whether a size is the template's is not recorded. One that has warm sandboxes is worth them; of any other the
		// next create says.
		p.custom = !r.Warm && (!known || p.custom)
		if !r.Warm && !r.StartedAt.Before(p.use.last) {
			p.template, p.use.last = r.TemplateID, r.StartedAt
		} else if p.use.last.IsZero() {
			p.use.last = r.StartedAt
		}
	}
	return in
}

// recoverOne brings one record together with what there is of its guest.
func (a *Agent) recoverOne(ctx context.Context, in *instance, running bool) error {
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	if err := a.recoverEnd(ctx, in); err != nil {
		a.log.WarnContext(ctx, "end of a sandbox not moved", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
	}
	var err error
	switch r := in.record(); {
	case r.State.Ended():
		return nil
	case r.State == sandbox.StateCreating && running && r.Warm && r.Ready:
		if a.adoptWarm(ctx, in) == nil {
			return nil
		}
		err = a.clear(ctx, in)
	case r.State == sandbox.StateCreating:
		err = a.clear(ctx, in)
	case r.State == sandbox.StateStopping:
		err = a.end(ctx, in, r.Ending)
	case r.State == sandbox.StateMigrating:
		err = a.recoverMoving(ctx, in, running)
	case r.State == sandbox.StatePaused, r.State == sandbox.StateResuming, r.State == sandbox.StatePausing && !running:
		err = a.recoverPaused(ctx, in)
	case r.State == sandbox.StatePausing:
		err = a.recoverPausing(ctx, in)
	case !running:
		err = a.lose(ctx, in, "the sandbox's process ended while nobody watched it: its node was restarted or stopped")
	default:
		err = a.adopt(ctx, in)
	}
	if err != nil && ctx.Err() == nil {
		a.retryLater(ctx, in, err)
		return nil
	}
	return err
}

// recoverEnd moves a sandbox's end by what the machine's clock was set while the node was down.
func (a *Agent) recoverEnd(ctx context.Context, in *instance) error {
	if r := in.record(); r.Clock.Boot != a.clock.boot {
		r.Clock = a.clock.reading()
		in.set(&r)
		return nil
	}
	return a.followEnd(ctx, in)
}

// recoverPaused takes back a sandbox that is paused, or whose guest does not count yet or does not exist any more. Without
// the checkpoint it is lost.
func (a *Agent) recoverPaused(ctx context.Context, in *instance) error {
	r := in.record()
	m, err := a.saves.Get(r.Checkpoint)
	if err != nil && r.State == sandbox.StatePausing {
		return a.lose(ctx, in, "the sandbox's process ended while it was paused and nobody watched it")
	}
	if err != nil {
		return a.lose(ctx, in, fmt.Sprintf("what the sandbox was paused in is gone or damaged: %v", err))
	}
	if err := a.leave(ctx, in); err != nil {
		return err
	}
	switch {
	case r.State == sandbox.StatePausing:
		return a.putPaused(ctx, in, &m, "sandbox paused before a restart of the node")
	case r.State == sandbox.StateResuming && !r.Rewinding:
		return a.putBack(ctx, in, sandbox.Unavailablef("the node was restarted"))
	}
	return nil // a rollback goes on as soon as the reconcile loop runs
}

// recoverPausing lets a guest go on whose pause was not completed.
func (a *Agent) recoverPausing(ctx context.Context, in *instance) error {
	r := in.record()
	if err := a.dropOwn(&r); err != nil {
		return err
	}
	if err := a.engine.Thaw(ctx, in.id); err != nil {
		return fmt.Errorf("let sandbox %s go on: %w", in.id, err)
	}
	return a.adopt(ctx, in)
}

// lose ends a sandbox as lost.
func (a *Agent) lose(ctx context.Context, in *instance, reason string) error {
	a.log.WarnContext(ctx, "sandbox lost", slog.String("sandbox_id", string(in.id)), slog.String("reason", reason))
	return a.end(ctx, in, journal.Ending{State: sandbox.StateLost, Reason: reason, Type: "lost"})
}

// adopt takes a running sandbox back.
func (a *Agent) adopt(ctx context.Context, in *instance) error {
	if err := a.adoptNetwork(ctx, in); err != nil {
		return a.lose(ctx, in, fmt.Sprintf("the sandbox's network was gone after the node was restarted: %v", err))
	}
	r := in.record()
	line := journal.Line{Time: now(), Level: "info", Message: "sandbox adopted after a restart of the node"}
	if g, err := a.checkAdopted(ctx, in); err != nil {
		// It may be busy. It is somebody's, so it is kept.
		line.Level, line.Message = "warn", line.Message+fmt.Sprintf(", but the agent inside does not answer: %v", err)
		a.log.WarnContext(ctx, "adopted sandbox does not answer", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
	} else {
		g.close()
	}
	if !a.watch(in) {
		return sandbox.Unavailablef("node %s is shutting down", a.node)
	}
	r.State, r.Checkpoint, r.Deadline = sandbox.StateRunning, "", time.Time{}
	r.Generation++
	r.Append(line)
	return a.put(ctx, in, r, journal.Change{Type: "adopted", Time: line.Time, Sandbox: r.Sandbox})
}

// adoptWarm takes a warm sandbox back into its pool, if it is healthy.
func (a *Agent) adoptWarm(ctx context.Context, in *instance) error {
	if a.cfg.WarmMax == 0 {
		return sandbox.Unsupportedf("the warm pool is switched off")
	}
	if err := a.adoptNetwork(ctx, in); err != nil {
		return err
	}
	g, err := a.checkAdopted(ctx, in)
	if err != nil {
		return err
	}
	if !a.watch(in) {
		g.close()
		return sandbox.Unavailablef("node %s is shutting down", a.node)
	}
	in.keepGuest(g)
	r := in.record()
	a.mu.Lock()
	p := a.poolFor(keyOf(&r))
	p.ready = append(p.ready, in)
	a.mu.Unlock()
	if !in.alive() {
		a.forgetWarm(in)
	}
	return nil
}

func (a *Agent) adoptNetwork(ctx context.Context, in *instance) error {
	r := in.record()
	return a.network.Adopt(ctx, toAttachment(in.id, &r.Network), policyOf(&r))
}

// checkAdopted asks the agent inside whether it is there.
func (a *Agent) checkAdopted(ctx context.Context, in *instance) (*guestConn, error) {
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	g, err := a.connectGuest(ctx, in)
	if err != nil {
		return nil, err
	}
	if err := checkHealth(ctx, g); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

// StopAll ends every sandbox of the node, the warm ones and guests without a record included. It can be called after
// Run has returned. What did not end is in the error.
func (a *Agent) StopAll(ctx context.Context, reason string) error {
	all := a.instances()
	errs := make([]error, len(all))
	var g errgroup.Group
	g.SetLimit(recoverers)
	for i, in := range all {
		g.Go(func() error {
			errs[i] = a.stopOne(ctx, in, reason) // all of them are tried
			return nil
		})
	}
	_ = g.Wait() // the errors are in errs
	var rest []error
	guests, err := a.engine.List(ctx)
	if err != nil {
		rest = append(rest, fmt.Errorf("list guests: %w", err))
	}
	for _, guest := range guests {
		if err := a.engine.Stop(ctx, guest.ID); err != nil {
			rest = append(rest, fmt.Errorf("end guest %s: %w", guest.ID, err))
		}
	}
	return errors.Join(errors.Join(errs...), errors.Join(rest...), a.network.Sweep(ctx))
}

func (a *Agent) stopOne(ctx context.Context, in *instance, reason string) error {
	in.interrupt(sandbox.Unavailablef("all sandboxes of the node are being ended: %s", reason))
	if err := in.lock(ctx); err != nil {
		return err
	}
	defer a.release(in)
	switch r := in.record(); {
	case r.State.Ended():
		return nil
	case r.State == sandbox.StateCreating:
		a.forgetWarm(in)
		return a.clear(ctx, in)
	default:
		return a.end(ctx, in, journal.Ending{State: sandbox.StateDeleted, Reason: reason, Type: "killed"})
	}
}
