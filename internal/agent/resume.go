package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// attempt is the last resume of a sandbox that was carried out.
type attempt struct {
	number int
	err    error
}

// wish is what a resume asks for.
type wish struct {
	term
	cold      bool
	autoPause *bool
	permitted bool // by the server, see Guard
}

// Resume makes a paused sandbox run again; one that runs gets its timeout. Calls for one sandbox that meet restore it once.
func (a *Agent) Resume(ctx context.Context, req *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	a.followClock(ctx)
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	w := wish{
		term: term{forever: req.GetTimeout() == nil, extendOnly: req.GetExtendOnly()},
		cold: req.GetCold(), autoPause: req.AutoPause, permitted: req.GetPermitted(),
	}
	if !w.forever {
		if w.timeout, err = fromWireTimeout(req.GetTimeout()); err != nil {
			return nil, toWireError(err)
		}
	}
	resumed, err := a.resume(ctx, in, &w)
	if err != nil {
		return nil, toWireError(err)
	}
	r := in.record()
	return &agentv1.ResumeResponse{Sandbox: toWireSandbox(&r.Sandbox), Load: a.load(), Resumed: resumed}, nil
}

func (a *Agent) resume(ctx context.Context, in *instance, w *wish) (resumed bool, err error) {
	before := in.lastResume().number
	if err := in.lock(ctx); err != nil {
		return false, err
	}
	defer a.release(in)
	r := in.record()
	switch {
	case r.State == sandbox.StateRunning && in.alive():
		return false, a.extend(ctx, in, w)
	case r.State != sandbox.StatePaused:
		return false, in.unfit(&r)
	case w.cold && r.PausedKind == sandbox.CheckpointMemory:
		return false, sandbox.Unsupportedf("sandbox %s was paused with its memory and can only go on from there: "+
			"only one that was paused with its files alone boots anew", in.id)
	case r.Guarded && !w.permitted:
		return false, errGuarded(&r)
	}
	if last := in.lastResume(); last.number != before && last.err != nil {
		return false, last.err // somebody tried while we waited
	}
	err = a.wakeUp(ctx, in, w)
	in.noteResume(err)
	return err == nil, err
}

// extend treats a running sandbox as SetTimeout does.
//
// Preconditions: the caller holds in.op.
func (a *Agent) extend(ctx context.Context, in *instance, w *wish) error {
	r := in.record()
	end, auto := w.end(now()), r.AutoPause
	if w.extendOnly && !later(end, r.EndAt) {
		end = r.EndAt
	}
	if w.autoPause != nil {
		auto = *w.autoPause
	}
	if r.EndAt.Equal(end) && auto == r.AutoPause {
		return nil
	}
	if !r.EndAt.Equal(end) {
		r.Timeout = w.timeout
		in.setAtOnce(false)
	}
	r.EndAt, r.AutoPause = end, auto
	r.Generation++
	return a.put(ctx, in, r, journal.Change{Type: "timeout_set", Time: now(), Sandbox: r.Sandbox})
}

// wakeUp takes a paused sandbox to running; once begun, it does not depend on the caller. After an error the sandbox is
// paused as before.
//
// Preconditions: the caller holds in.op.
func (a *Agent) wakeUp(ctx context.Context, in *instance, w *wish) (err error) {
	began := time.Now()
	defer func() { a.metrics.saved("resume", err, began) }()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.CreateTimeout)
	defer cancel()
	if err := a.clearLeft(ctx, in); err != nil {
		return err
	}
	if err := a.readmit(ctx, in, in.record()); err != nil {
		return err
	}
	err = a.restore(ctx, in)
	if err == nil {
		r := in.record()
		r.EndAt, r.Timeout = w.end(now()), w.timeout
		if w.autoPause != nil {
			r.AutoPause = *w.autoPause
		}
		err = a.putRestored(ctx, in, r, "resumed")
	}
	if err != nil {
		err = fmt.Errorf("resume sandbox %s: %w", in.id, notOfTheCaller(err))
		a.retryLater(ctx, in, a.putBack(ctx, in, err))
		return err
	}
	a.log.InfoContext(ctx, "sandbox resumed", slog.String("op", "resume"), slog.String("sandbox_id", string(in.id)),
		slog.Duration("after", time.Since(began)))
	return nil
}

// notOfTheCaller gives an error about a checkpoint a kind that does not blame whoever asks for a resume.
func notOfTheCaller(err error) error {
	if errors.Is(err, sandbox.ErrInvalid) || isNotFound(err) {
		return sandbox.Unavailablef("%v", err)
	}
	return err
}

// clearLeft takes away what an earlier pause has left on the machine.
func (a *Agent) clearLeft(ctx context.Context, in *instance) error {
	if !in.isLeft() {
		return nil
	}
	return a.leave(ctx, in)
}

// readmit makes room for a paused sandbox; from then on it is resuming. Warm sandboxes give way.
func (a *Agent) readmit(ctx context.Context, in *instance, r journal.Record) error {
	r.Generation++
	r.Deadline = now().Add(a.cfg.CreateTimeout)
	return a.withRoom(ctx, r.Resources, func() error {
		got, err := a.journal.Readmit(ctx, r)
		if err == nil {
			in.set(&got)
		}
		return err
	})
}

// restore starts the guest of a resuming sandbox from its checkpoint, up to where the agent inside knows of it.
//
// Preconditions: the caller holds in.op, and there is no guest.
func (a *Agent) restore(ctx context.Context, in *instance) error {
	in.renew()
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
	return a.initGuest(ctx, in, g)
}

// putRestored makes the guest count in place of the checkpoint, which is then deleted.
func (a *Agent) putRestored(ctx context.Context, in *instance, r journal.Record, change string) error {
	if !in.alive() {
		return sandbox.Unavailablef("sandbox %s ended while it was started", in.id)
	}
	old, at := r.Checkpoint, now()
	r.State, r.Checkpoint, r.Deadline, r.Rewinding, r.Guarded = sandbox.StateRunning, "", time.Time{}, false, false
	r.PausedAt, r.PausedKind, r.PausedBytes, r.Reason = time.Time{}, "", 0, ""
	r.Generation++
	r.Append(journal.Line{Time: at, Level: "info", Message: ranAgain[change]})
	if err := a.put(ctx, in, r, journal.Change{Type: change, Time: at, Sandbox: r.Sandbox}); err != nil {
		return err
	}
	in.settled()
	in.setAtOnce(false)
	a.dropLater(old)
	return nil
}

// ranAgain is what a sandbox's log says of its ways to run again.
//
//nolint:gochecknoglobals // a table, never written
var ranAgain = map[string]string{
	"resumed": "sandbox resumed", "rolled_back": "sandbox rolled back",
	"arrived": "sandbox arrived from another node", "returned": "sandbox goes on where it was: its move was given up",
}

// putBack makes a sandbox paused again that could not be resumed. When it fails, the sandbox stays in resuming, and the
// reconcile loop tries again.
//
// Preconditions: the caller holds in.op.
func (a *Agent) putBack(ctx context.Context, in *instance, cause error) error {
	ctx = context.WithoutCancel(ctx)
	if err := a.leave(ctx, in); err != nil {
		return err
	}
	a.log.WarnContext(ctx, "sandbox not resumed", slog.String("sandbox_id", string(in.id)), slog.Any("err", cause))
	r := in.record()
	var changes []journal.Change
	if r.Rewinding { // it was running until now
		r.PausedAt = now()
		changes = []journal.Change{{Type: "paused", Time: r.PausedAt}}
	}
	r.State, r.Deadline, r.Network, r.Rewinding = sandbox.StatePaused, time.Time{}, journal.Network{}, false
	r.Generation++
	r.Append(journal.Line{Time: now(), Level: "warn", Message: fmt.Sprintf("sandbox not resumed, it stays paused: %v", cause)})
	for i := range changes {
		changes[i].Sandbox = r.Sandbox
	}
	return a.put(ctx, in, r, changes...)
}

// settleResuming goes on with a rollback, or puts back a sandbox that nobody resumes any more.
//
// Preconditions: the caller holds in.op.
func (a *Agent) settleResuming(ctx context.Context, in *instance) error {
	r := in.record()
	if r.Rewinding && now().Before(r.Deadline) {
		return a.finishRewind(ctx, in)
	}
	return a.putBack(ctx, in, sandbox.Unavailablef("it was given up"))
}

func (in *instance) lastResume() attempt {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.resume
}

func (in *instance) noteResume(err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.resume = attempt{in.resume.number + 1, err}
}

// settled forgets what failed before.
func (in *instance) settled() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.tries, in.retryAt = 0, time.Time{}
}
