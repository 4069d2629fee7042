package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// A server's leader sees to the ends of sandboxes: it knows of all requests that are open, and has this node pause or end them
// with Pause and Kill. The node acts by itself on what somebody ended at once, where no server answers, and where one does
// and has done nothing for long.

const (
	// serverSlack is how long after a fixed end the node waits for the server that sees to it.
	serverSlack = 15 * time.Second
	// useRecheck is how often the node looks at a sandbox that is in use beyond its time.
	useRecheck = time.Second
)

// ownEnd returns when the node itself acts on a running sandbox's end.
func (p *planner) ownEnd(b *SandboxState) time.Time {
	end, decided := b.EndAt, p.state.Decided
	switch {
	case b.AtOnce:
		return end
	case b.Idle && decided.After(p.now): // when that is, only the server knows
		return latest(end, decided)
	case b.Idle && b.Open:
		return latest(end, p.now.Add(useRecheck))
	case b.Idle:
		return latest(end, b.UsedAt.Add(b.Timeout))
	}
	if slack := end.Add(serverSlack); decided.After(slack) {
		decided = slack
	}
	return latest(end, decided)
}

func latest(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}

// decidedUntil returns until when a server sees to ends; zero where none does.
func (a *Agent) decidedUntil() time.Time {
	if t := a.decided.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// setDecided notes for how long from now on a server sees to ends.
func (a *Agent) setDecided(lasts time.Duration) {
	var until time.Time
	if lasts > 0 {
		until = now().Add(lasts)
	}
	before := a.decidedUntil()
	a.decided.Store(&until)
	if until.Before(before) {
		a.poke()
	}
}

// endReason says why the end of a sandbox came.
func endReason(r *journal.Record) string {
	if r.IdleTimeout {
		return fmt.Sprintf("idle for %s", r.Timeout)
	}
	return "timeout"
}

// timedOut is the ending of a sandbox whose time is up.
func timedOut(reason string) journal.Ending {
	return journal.Ending{State: sandbox.StateDeleted, Reason: reason, Type: "timed_out"}
}

// busyBoxes returns the running sandboxes whose end moves with their use and that are in use, as far as no proxy sees it.
func (a *Agent) busyBoxes() []string {
	var out []string
	for _, in := range a.instances() {
		if in.busyInside(a.cfg.IdleCPUPercent) {
			out = append(out, string(in.id))
		}
	}
	return out
}

// busyInside reports whether a sandbox's processes use so much of a core, in percent, or somebody on this machine is
// connected; a limit of 0 or less leaves the processes out.
func (in *instance) busyInside(percent float64) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.busyLocked(percent)
}

func (in *instance) busyLocked(percent float64) bool {
	if !in.rec.IdleTimeout || in.rec.State != sandbox.StateRunning {
		return false
	}
	for c := range in.conns {
		if c.unseen() {
			return true
		}
	}
	return percent > 0 && float64(in.samples.newest()) >= percent
}

// checkIdle refuses to end a sandbox for lack of use that is at work: what was reported of that is seconds old.
func (a *Agent) checkIdle(ctx context.Context, in *instance) error {
	if r := in.record(); !r.IdleTimeout || r.State != sandbox.StateRunning {
		return nil
	}
	if a.cfg.IdleCPUPercent > 0 {
		if err := a.sampleOne(ctx, in); err != nil {
			a.log.DebugContext(ctx, "sandbox not sampled", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
		}
	}
	if !in.busyInside(a.cfg.IdleCPUPercent) {
		return nil
	}
	a.announce() // that it is in use
	return sandbox.Conflictf("sandbox %s is at work", in.id)
}

// newest returns the processor use of the newest sample, in percent of a core; 0 where there is none.
func (s *samples) newest() float32 {
	n := len(s.points)
	if n == 0 {
		return 0
	}
	return s.points[(s.oldest+n-1)%n].cpuPercent
}

// setAtOnce notes whether somebody wants the sandbox's end to come at once.
func (in *instance) setAtOnce(wanted bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.atOnce = wanted
}
