package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// boot gives a sandbox its network, starts its guest, and waits until the agent inside answers. It returns the connection
// on which it did. The caller clears up after an error.
//
// Preconditions: the caller holds in.op and a place in the gate.
func (a *Agent) boot(ctx context.Context, in *instance) (*guestConn, error) {
	r := in.record()
	from, err := a.holdSource(&r)
	if err != nil {
		return nil, err
	}
	defer from.Release()
	if err := a.launch(ctx, in, engine.Spec{Checkpoint: from.Dir}); err != nil {
		return nil, err
	}
	return a.awaitGuest(ctx, in)
}

// launch gives a sandbox its network and starts its guest from what spec names.
//
// Preconditions: the caller holds in.op and a place in the gate.
func (a *Agent) launch(ctx context.Context, in *instance, spec engine.Spec) error {
	r := in.record()
	path, err := a.images.Path(r.ImageDigest)
	if isNotFound(err) {
		return sandbox.Unavailablef("image of sandbox %s: %v: build the template again, or restart the node, which does that for the default one",
			in.id, err)
	}
	if err != nil {
		return fmt.Errorf("image of sandbox %s: %w", in.id, err)
	}
	att, err := a.network.Acquire(ctx, in.id, policyOf(&r))
	if err != nil {
		return err
	}
	in.setNetwork(fromAttachment(&att))
	if err := context.Cause(ctx); err != nil {
		return err
	}
	spec.ID, spec.RootFS, spec.ScratchDir, spec.NetNS, spec.Hostname = in.id, path, a.cfg.ScratchDir, att.NetNS, string(in.id)
	spec.Args, spec.Env = a.cfg.GuestArgs, []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	spec.Limits = r.Resources
	if err = a.engine.Start(ctx, spec); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause // says who ended it, and why
		}
		return fmt.Errorf("start sandbox %s: %w", in.id, err)
	}
	if !a.watch(in) {
		return sandbox.Unavailablef("node %s is shutting down", a.node)
	}
	return nil
}

// watch waits in the background for the guest's end. It reports false when the node shuts down.
func (a *Agent) watch(in *instance) bool {
	life := in.lives()
	return a.crew.run(func(ctx context.Context) {
		for tries := 0; ; tries++ {
			x, err := a.engine.Wait(ctx, in.id)
			switch {
			case ctx.Err() != nil:
				return
			case err == nil:
				a.died(ctx, in, life, x)
				return
			case isNotFound(err):
				a.died(ctx, in, life, engine.Exit{At: now(), Code: -1, Reason: "its process is gone"})
				return
			}
			a.log.WarnContext(ctx, "sandbox not watched, trying again", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
			if !pause(ctx, backoff(tries)) {
				return
			}
		}
	})
}

// died handles the end of a guest, wanted or not.
func (a *Agent) died(ctx context.Context, in *instance, life int, x engine.Exit) {
	r := in.record()
	reason := exitReason(&x, r.Resources)
	if !in.ended(life, x, reason) {
		return
	}
	a.forgetWarm(in)
	if in.lock(ctx) != nil {
		return // the node shuts down; the next start finds the guest gone
	}
	defer a.release(in)
	switch r := in.record(); {
	case in.lives() != life:
		// It was paused or rolled back meanwhile.
	case r.State.Ended() || r.State == sandbox.StateStopping:
		// Somebody ended it.
	case r.State == sandbox.StateMigrating && !a.has(in):
		// It did not come.
	case r.State == sandbox.StateMigrating:
		a.log.WarnContext(ctx, "sandbox ended while it moved", slog.String("sandbox_id", string(in.id)), slog.String("reason", reason))
		a.retryLater(ctx, in, a.bereave(ctx, in))
	case r.State == sandbox.StateCreating:
		if _, known := a.get(in.id); known {
			a.retryLater(ctx, in, a.clear(ctx, in))
		}
	default:
		a.log.WarnContext(ctx, "sandbox ended by itself", slog.String("sandbox_id", string(in.id)), slog.String("reason", reason))
		a.retryLater(ctx, in, a.end(ctx, in, journal.Ending{State: sandbox.StateFailed, Reason: reason, Type: "failed"}))
	}
}

// exitReason says for people why a guest ended.
func exitReason(x *engine.Exit, limits sandbox.Resources) string {
	const mib = 1 << 20
	switch {
	case x.Reason != "":
		return x.Reason
	case x.OOM:
		return fmt.Sprintf("out of memory: the limit is %d MiB", limits.MemoryBytes/mib)
	case x.Code >= 0:
		return fmt.Sprintf("the sandbox's first process exited with code %d", x.Code)
	}
	return "the sandbox's process was killed"
}

// abandon clears away a sandbox that did not come to be, and gives its op back.
//
// Preconditions: the caller holds in.op.
func (a *Agent) abandon(ctx context.Context, in *instance) {
	ctx = context.WithoutCancel(ctx)
	a.retryLater(ctx, in, a.clear(ctx, in))
	a.release(in)
}

// clear takes away whatever there is of a sandbox that nobody was told of.
//
// Preconditions: the caller holds in.op.
func (a *Agent) clear(ctx context.Context, in *instance) error {
	if err := a.free(ctx, in); err != nil {
		return err
	}
	if err := a.journal.Forget(context.WithoutCancel(ctx), in.id); err != nil {
		return err
	}
	a.drop(in)
	return nil
}

// end takes a sandbox that somebody was told of through stopping to its end, and reports that. When it fails, the sandbox
// stays in stopping, and the reconcile loop tries again.
//
// Preconditions: the caller holds in.op.
func (a *Agent) end(ctx context.Context, in *instance, e journal.Ending) error {
	ctx = context.WithoutCancel(ctx)
	r := in.record()
	if r.State == sandbox.StateStopping {
		e = r.Ending // decided earlier
	} else {
		r.State, r.Ending = sandbox.StateStopping, e
		r.Generation++
		if err := a.putStopping(ctx, in, r); err != nil {
			return err
		}
	}
	if err := a.free(ctx, in); err != nil {
		return err
	}
	r = in.record()
	if err := a.dropOwn(&r); err != nil {
		return err
	}
	r.State, r.Reason, r.EndedAt, r.Deadline, r.Rewinding = e.State, e.Reason, now(), time.Time{}, false
	r.Generation++
	level := "info"
	if e.State != sandbox.StateDeleted {
		level = "error"
	}
	r.Append(journal.Line{Time: r.EndedAt, Level: level, Message: "sandbox ended: " + e.Reason})
	if err := a.put(ctx, in, r, journal.Change{Type: e.Type, Time: r.EndedAt, Sandbox: r.Sandbox}); err != nil {
		return err
	}
	a.log.InfoContext(ctx, "sandbox ended", slog.String("sandbox_id", string(in.id)), slog.String("state", string(e.State)),
		slog.String("reason", e.Reason), slog.Duration("lived", r.EndedAt.Sub(r.StartedAt)))
	return nil
}

// putStopping notes that a sandbox is to end. Where the journal cannot be written, the guest goes first: what it holds of a
// full disk may be all that is missing. Should the process end in between, the next one reports the sandbox as lost.
//
// Preconditions: the caller holds in.op.
func (a *Agent) putStopping(ctx context.Context, in *instance, r journal.Record) error {
	err := a.put(ctx, in, r)
	if err == nil || !errors.Is(err, sandbox.ErrUnavailable) {
		return err
	}
	if ferr := a.free(ctx, in); ferr != nil {
		return errors.Join(err, ferr)
	}
	return a.put(ctx, in, r)
}

// free takes away the guest and the network of a sandbox. It does nothing where there is nothing.
//
// Preconditions: the caller holds in.op.
func (a *Agent) free(ctx context.Context, in *instance) error {
	in.closeConns()
	in.dropGuest()
	in.dropSamples()
	return a.halt(ctx, in)
}

// halt takes away the guest and the network alone.
//
// Preconditions: the caller holds in.op.
func (a *Agent) halt(ctx context.Context, in *instance) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.StopTimeout)
	defer cancel()
	if err := a.engine.Stop(ctx, in.id); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", in.id, err)
	}
	if err := a.network.Release(ctx, in.id); err != nil {
		return fmt.Errorf("release network of sandbox %s: %w", in.id, err)
	}
	return nil
}

// retryLater notes that the end of a sandbox did not succeed, if err says so; the reconcile loop takes it from there.
func (a *Agent) retryLater(ctx context.Context, in *instance, err error) {
	if err == nil {
		return
	}
	at := in.failed(now())
	level := slog.LevelWarn
	if at.Sub(now()) > 20*time.Second {
		level = slog.LevelError
	}
	a.log.LogAttrs(ctx, level, "sandbox not cleared away, trying again", slog.String("sandbox_id", string(in.id)),
		slog.Time("at", at), slog.Any("err", err))
	a.poke()
}
