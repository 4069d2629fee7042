package guest

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

const (
	// retention is how long an exit can still be asked for.
	retention = 30 * time.Second
	// maxRetained bounds how many exits are kept.
	maxRetained = 1024
)

// processes holds what runs, and for a while what ran.
type processes struct {
	reaper *reaper
	log    *slog.Logger

	mu    sync.Mutex
	live  map[*proc]struct{}
	ended []*proc // oldest first; looked through only when somebody asks or adds
}

func newProcesses(r *reaper, log *slog.Logger) *processes {
	return &processes{reaper: r, log: log, live: map[*proc]struct{}{}}
}

// start runs c and subscribes to it from its first byte on. A deadline in ctx is the process's: it is killed then. The
// end of ctx without one, as when the client goes away, ends only the subscription.
func (t *processes) start(ctx context.Context, c *command) (*proc, *subscriber, error) {
	p, err := spawn(t.reaper, c)
	if err != nil {
		return nil, nil, err
	}
	sub := p.hub.subscribe(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		p.timeout = time.AfterFunc(time.Until(deadline), func() { _ = p.kill(t.reaper) }) // what fails is gone already
	}
	t.mu.Lock()
	t.live[p] = struct{}{}
	t.mu.Unlock()
	t.log.LogAttrs(ctx, slog.LevelInfo, "process started", slog.Int("pid", p.pid), slog.String("cmd", c.config.GetCmd()),
		slog.String("args", strings.Join(c.config.GetArgs(), " ")), slog.String("user", c.account.name), slog.String("cwd", c.dir))
	go p.pump(t.finished)
	return p, sub, nil
}

// finished moves a process from the living to the ended.
func (t *processes) finished(p *proc) {
	p.endedAt = time.Now()
	t.mu.Lock()
	delete(t.live, p)
	t.forget(p.endedAt)
	t.ended = append(t.ended, p)
	t.mu.Unlock()
	end := p.endEvent().GetEnd()
	t.log.LogAttrs(context.Background(), slog.LevelInfo, "process ended", slog.Int("pid", p.pid), slog.String("cmd", p.config.GetCmd()),
		slog.Int("exit_code", int(end.GetExitCode())), slog.String("status", end.GetStatus()))
}

// forget drops exits that are too old or too many. The caller holds mu.
func (t *processes) forget(now time.Time) {
	n := max(0, len(t.ended)-maxRetained+1)
	for n < len(t.ended) && now.Sub(t.ended[n].endedAt) > retention {
		n++
	}
	t.ended = slices.Delete(t.ended, 0, n)
}

// forgetEnded drops every retained exit.
func (t *processes) forgetEnded() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = nil
}

// find returns a running process, or, if ended is wanted, one whose exit is retained; nil if there is none.
func (t *processes) find(sel *process.ProcessSelector, wantEnded bool) *proc {
	matches := func(p *proc) bool {
		if tag, ok := sel.GetSelector().(*process.ProcessSelector_Tag); ok {
			return p.tag != nil && *p.tag == tag.Tag
		}
		return p.pid == int(sel.GetPid())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for p := range t.live {
		if matches(p) {
			return p
		}
	}
	if !wantEnded {
		return nil
	}
	t.forget(time.Now())
	for _, p := range slices.Backward(t.ended) {
		if matches(p) {
			return p
		}
	}
	return nil
}

// list returns what runs, in the order of their numbers.
func (t *processes) list() []*proc {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.SortedFunc(maps.Keys(t.live), func(a, b *proc) int { return cmp.Compare(a.pid, b.pid) })
}

// killAll ends everything, with what the processes started, before the agent itself goes.
func (t *processes) killAll() {
	var killing sync.WaitGroup
	for _, p := range t.list() {
		killing.Go(func() { _ = p.kill(t.reaper) }) // what fails is gone already
	}
	killing.Wait()
}

// signal sends sig to a process and its group. A kill is answered after the exit has been collected.
func (t *processes) signal(p *proc, sig syscall.Signal) error {
	if sig == syscall.SIGKILL {
		return p.kill(t.reaper)
	}
	_, err := t.reaper.signal(p.pid, sig)
	return err
}
