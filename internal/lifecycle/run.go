package lifecycle

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// batch is how many sandboxes are decided about at once.
	batch = 1024
	// share is the part of what is carried out at once that one node may have, so that a slow one does not hold up others.
	share = 4
	// fullNode is the wait where a node has its share.
	fullNode = 50 * time.Millisecond
	// defaultAtOnce is how many decisions are carried out at the same time.
	defaultAtOnce = 512
	// idleTick bounds how long the loop sleeps, so that a clock that was set does not stop it.
	idleTick = 10 * time.Second
	// jumpMin is how far the clock must have jumped for all that waits to be looked at anew.
	jumpMin = 2 * time.Second
	// actTimeout bounds one decision's carrying out.
	actTimeout = time.Minute
	// maxBackoff bounds the wait after a decision that could not be carried out.
	maxBackoff = 30 * time.Second
)

// cluster is what is known, and who carries decisions out. A decision about another generation than the sandbox has, or about
// one that is used after all, is ErrConflict.
type cluster interface {
	// Item returns what is known of a sandbox now; false where it is not, or has ended.
	Item(id sandbox.ID) (Item, bool)
	Kill(ctx context.Context, v Verdict) error
	Pause(ctx context.Context, v Verdict) error
}

// Config is what a Loop is made of. Cluster and Log are required.
type Config struct {
	Cluster cluster
	Log     *slog.Logger
	Policy  Policy
	// AtOnce is how many decisions are carried out at the same time; 512 by default. A node has at most a quarter of them.
	AtOnce int
}

// Loop is THE cluster's reconcile loop of sandboxes' ends.
type Loop struct {
	cluster cluster
	log     *slog.Logger
	policy  Policy
	atOnce  int
	wake    chan struct{} // of capacity 1
	// read returns the wall clock and the one that nobody sets; last is what it returned last, which is Lead's.
	read func() (wall time.Time, mono time.Duration)
	last struct {
		wall time.Time
		mono time.Duration
	}

	mu    sync.Mutex
	queue *queue
	// acting counts what is being carried out, by node.
	acting map[sandbox.NodeID]int
	// inHand are the sandboxes with something being carried out, with the news that came meanwhile: when to look again, or
	// zero for never.
	inHand map[sandbox.ID]time.Time

	stats Stats
}

// Stats counts what a Loop has done.
type Stats struct {
	Killed, Paused, Refused, Failed atomic.Int64
	// LastRun is when the loop last looked, in Unix nanoseconds.
	LastRun atomic.Int64
	// Lag is told by how much each decision was late when it was first made; nil tells nobody. It is set before Lead.
	Lag func(time.Duration)
}

func (s *Stats) decided(lag time.Duration) {
	if s.Lag != nil {
		s.Lag(lag)
	}
}

// New returns a Loop that decides nothing before Lead.
func New(cfg Config) *Loop {
	if cfg.AtOnce <= 0 {
		cfg.AtOnce = defaultAtOnce
	}
	born := time.Now()
	l := &Loop{
		read:    func() (time.Time, time.Duration) { t := time.Now(); return t.Round(0), t.Sub(born) },
		cluster: cfg.Cluster, log: cfg.Log, policy: cfg.Policy.WithDefaults(), atOnce: cfg.AtOnce,
		wake: make(chan struct{}, 1), queue: newQueue(), acting: make(map[sandbox.NodeID]int),
		inHand: make(map[sandbox.ID]time.Time),
	}
	l.last.wall, l.last.mono = l.read()
	return l
}

// Stats returns the counters.
func (l *Loop) Stats() *Stats { return &l.stats }

// Waiting returns how many sandboxes have an end that is waited for.
func (l *Loop) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue.at)
}

// Observe takes news about a sandbox. It costs little, and is right at any time, leading or not.
func (l *Loop) Observe(s *sandbox.Sandbox) {
	due := s.EndAt
	if s.State != sandbox.StateRunning {
		due = time.Time{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.inHand[s.ID]; ok {
		l.inHand[s.ID] = due
		return
	}
	l.expectLocked(s.ID, due)
}

// expectLocked has a sandbox looked at when its end comes; zero means never.
func (l *Loop) expectLocked(id sandbox.ID, due time.Time) {
	if due.IsZero() {
		l.queue.drop(id)
		return
	}
	before, had := l.queue.next()
	l.queue.set(id, due)
	if !had || due.Before(before) {
		signal(l.wake)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Lead decides and has decisions carried out until ctx ends: that is, for as long as this server leads. It returns when what
// was begun has ended.
func (l *Loop) Lead(ctx context.Context) {
	var g errgroup.Group
	g.SetLimit(l.atOnce)
	defer func() { _ = g.Wait() }() // they return no errors
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-l.wake:
		}
		for ctx.Err() == nil && l.step(ctx, &g) {
		}
		timer.Reset(l.sleep(time.Now()))
	}
}

func (l *Loop) sleep(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	due, ok := l.queue.next()
	if !ok {
		return idleTick
	}
	return min(idleTick, max(0, due.Sub(now)))
}

// step decides about what is due, and reports whether more may be.
func (l *Loop) step(ctx context.Context, g *errgroup.Group) bool {
	now := time.Now()
	l.stats.LastRun.Store(now.UnixNano())
	jumped := l.jumped()
	l.mu.Lock()
	if jumped {
		l.queue.hasten(now)
	}
	taken := l.queue.take(now, batch)
	l.mu.Unlock()
	if len(taken) == 0 {
		return false
	}
	items := make([]Item, 0, len(taken))
	tries := make([]int, 0, len(taken))
	for i := range taken {
		if it, ok := l.cluster.Item(taken[i].id); ok {
			items, tries = append(items, it), append(tries, taken[i].tries)
		}
	}
	for i, v := range Plan(now, items, l.policy) {
		switch v.Kind {
		case Nothing:
		case Wait:
			l.again(v.ID, v.At, 0)
		case Kill, Pause:
			l.dispatch(ctx, g, &items[i], v, tries[i])
		}
	}
	return len(taken) == batch
}

// jumped reports whether the clock was set since the last call. When something is due may then be too late by the clock.
func (l *Loop) jumped() bool {
	wall, mono := l.read()
	d := wall.Sub(l.last.wall) - (mono - l.last.mono)
	l.last.wall, l.last.mono = wall, mono
	return d.Abs() >= jumpMin
}

// dispatch has a decision carried out, or puts it off where the node has enough to do.
func (l *Loop) dispatch(ctx context.Context, g *errgroup.Group, it *Item, v Verdict, tries int) {
	node, now := it.Sandbox.NodeID, time.Now()
	l.mu.Lock()
	full := l.acting[node] >= max(1, l.atOnce/share)
	if !full {
		l.acting[node]++
		l.inHand[v.ID] = time.Time{}
		l.queue.drop(v.ID)
	}
	l.mu.Unlock()
	if full {
		l.again(v.ID, now.Add(fullNode), tries)
		return
	}
	if tries == 0 {
		l.stats.decided(now.Sub(End(&it.Sandbox, it.Activity)))
	}
	g.Go(func() error {
		retry := l.act(ctx, v, tries)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.acting[node]--; l.acting[node] == 0 {
			delete(l.acting, node)
		}
		news := l.inHand[v.ID]
		delete(l.inHand, v.ID)
		if retry > 0 {
			l.againLocked(v.ID, time.Now().Add(retry), tries+1)
		} else {
			l.expectLocked(v.ID, news)
		}
		return nil
	})
}

// again has a sandbox looked at again, unless news came meanwhile.
func (l *Loop) again(id sandbox.ID, at time.Time, tries int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.queue.at[id] == nil {
		l.againLocked(id, at, tries)
	}
}

func (l *Loop) againLocked(id sandbox.ID, at time.Time, tries int) {
	l.queue.set(id, at)
	l.queue.at[id].tries = tries
	signal(l.wake)
}

// act carries a decision out. One that is refused, or that could not be carried out, is made anew after the time that is
// returned.
func (l *Loop) act(ctx context.Context, v Verdict, tries int) (retry time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, actTimeout)
	defer cancel()
	var err error
	if v.Kind == Kill {
		err = l.cluster.Kill(ctx, v)
	} else {
		err = l.cluster.Pause(ctx, v)
	}
	switch {
	case err == nil && v.Kind == Kill:
		l.stats.Killed.Add(1)
	case err == nil:
		l.stats.Paused.Add(1)
	case errors.Is(err, sandbox.ErrNotFound):
	case errors.Is(err, sandbox.ErrConflict):
		l.stats.Refused.Add(1)
		return backoff(tries)
	default:
		l.stats.Failed.Add(1)
		retry = backoff(tries)
		l.log.LogAttrs(ctx, slog.LevelWarn, "sandbox's end not carried out, trying again", slog.String("op", string(v.Kind)),
			slog.String("sandbox_id", string(v.ID)), slog.Duration("in", retry), slog.Any("err", err))
	}
	return retry
}

// backoff is the wait before try number tries+2: 100 ms, doubled each time, at most 30 s.
func backoff(tries int) time.Duration {
	const first = 100 * time.Millisecond
	return min(maxBackoff, first<<min(tries, 16))
}
