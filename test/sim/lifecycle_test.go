package sim

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/lifecycle"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// What commands take on a machine with two cores, which carries out two at a time.
const (
	createTakes = 45 * time.Millisecond
	killTakes   = 25 * time.Millisecond
	pauseTakes  = 60 * time.Millisecond
	nodeCores   = 2
)

// busyNode is a node on which commands take time, and wait for each other.
type busyNode struct {
	*apitest.Node
	cores chan struct{}
	// instant has commands take no time; it is set and cleared while nothing is under way.
	instant *bool
}

func (n *busyNode) work(d time.Duration) {
	if *n.instant {
		return
	}
	n.cores <- struct{}{}
	<-time.After(d)
	<-n.cores
}

func (n *busyNode) Create(ctx context.Context, req *agentv1.CreateRequest) (*agentv1.CreateResponse, error) {
	n.work(createTakes)
	return n.Node.Create(ctx, req)
}

func (n *busyNode) Kill(ctx context.Context, req *agentv1.KillRequest) (*agentv1.KillResponse, error) {
	n.work(killTakes)
	return n.Node.Kill(ctx, req)
}

func (n *busyNode) Pause(ctx context.Context, req *agentv1.PauseRequest) (*agentv1.PauseResponse, error) {
	n.work(pauseTakes)
	return n.Node.Pause(ctx, req)
}

// fleetOf is a server that leads, with nodes that report.
type fleetOf struct {
	*apitest.Cluster
	nodes   []*busyNode
	loop    *lifecycle.Loop
	instant bool

	mu   sync.Mutex
	lags []time.Duration
}

// forgetful keeps no events: the fake that does looks through all of them for each.
type forgetful struct{}

func (forgetful) Append(context.Context, []control.Event) error { return nil }

func (forgetful) Query(context.Context, control.EventQuery) ([]control.Event, error) { return nil, nil }

// due is what lifecycle knows of the server.
type due struct{ *control.Control }

func (d due) Item(id sandbox.ID) (lifecycle.Item, bool) {
	s, ok := d.Due(id)
	return lifecycle.Item{Sandbox: s.Sandbox, Known: s.Known, Activity: lifecycle.Activity{
		Open: s.Open, Last: s.Last, Busy: s.Working, Complete: s.Complete,
	}}, ok
}

func (d due) Kill(ctx context.Context, v lifecycle.Verdict) error {
	return d.EndDue(ctx, decided(v))
}

func (d due) Pause(ctx context.Context, v lifecycle.Verdict) error {
	return d.PauseDue(ctx, decided(v))
}

func decided(v lifecycle.Verdict) control.Decision {
	return control.Decision{ID: v.ID, Generation: v.Generation, Reason: v.Reason, Forced: v.Forced}
}

// newFleet returns a fleet that runs until the test ends. Setting it up takes no time.
func newFleet(tb testing.TB, nodes int) *fleetOf {
	tb.Helper()
	f := &fleetOf{instant: true, Cluster: apitest.NewCluster(tb, func(cfg *control.Config) { cfg.History = forgetful{} })}
	f.loop = lifecycle.New(lifecycle.Config{Cluster: due{f.Control}, Log: slog.New(slog.DiscardHandler)})
	f.loop.Stats().Lag = func(d time.Duration) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.lags = append(f.lags, d)
	}
	for i := range nodes {
		n := &busyNode{Node: apitest.NewNode(sandbox.NodeID(fmt.Sprintf("n%05d", i))), cores: make(chan struct{}, nodeCores), instant: &f.instant}
		f.Join(tb, n.Node)
		f.Agents.Set(n.ID, n)
		f.nodes = append(f.nodes, n)
	}
	f.Agents.Set("aaaaaa", nil) // the cluster's own
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = f.Control.RunProxy(ctx, &idle{}) })
	f.Control.FollowEnds(f.loop.Observe)
	f.Control.LeadEnds(true)
	running.Go(func() { f.loop.Lead(ctx) })
	running.Go(func() { f.report(ctx, tb) })
	tb.Cleanup(func() { cancel(); running.Wait() })
	return f
}

// report has every node report every two seconds, one after the other.
func (f *fleetOf) report(ctx context.Context, tb testing.TB) {
	tb.Helper()
	pause := time.NewTicker(2 * time.Second / time.Duration(len(f.nodes)))
	defer pause.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		if err := f.Report(tb, f.nodes[i%len(f.nodes)].Node, false); err != nil && ctx.Err() == nil {
			tb.Error(err)
			return
		}
	}
}

// fill makes sandboxes that end, or pause, evenly spread over the given time from then on.
func (f *fleetOf) fill(tb testing.TB, n int, then time.Time, over time.Duration) {
	tb.Helper()
	var g errgroup.Group
	g.SetLimit(8)
	for i := range n {
		g.Go(func() error {
			end := then.Add(over * time.Duration(i) / time.Duration(n))
			_, err := f.Control.Create(tb.Context(), control.CreateRequest{Timeout: time.Until(end), AutoPause: i%2 == 0})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		tb.Fatal(err)
	}
}

// creating makes sandboxes, so many a second, until stop is called, which returns how long each took.
func (f *fleetOf) creating(tb testing.TB, perSecond int) (stop func() []time.Duration) {
	tb.Helper()
	ctx, cancel := context.WithCancel(tb.Context())
	var mu sync.Mutex
	var took []time.Duration
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			running.Go(func() {
				began := time.Now()
				if _, err := f.Control.Create(tb.Context(), control.CreateRequest{Timeout: time.Hour}); err != nil {
					tb.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				took = append(took, time.Since(began))
			})
		}
	})
	return func() []time.Duration { cancel(); running.Wait(); return took }
}

// part returns the value below which the given part of all is.
func part(all []time.Duration, p float64) time.Duration {
	slices.Sort(all)
	return all[min(len(all)-1, int(p*float64(len(all))))]
}

func (f *fleetOf) done() int64 { s := f.loop.Stats(); return s.Killed.Load() + s.Paused.Load() }

// storm is what many ends in one second do.
type storm struct {
	took                           time.Duration
	p50Before, p99Before, p50, p99 time.Duration
	lag                            time.Duration
}

// runStorm has so many sandboxes, half of which are to be paused, end in the same second while others are made.
func runStorm(tb testing.TB, nodes, boxes, creates int) storm {
	tb.Helper()
	f := newFleet(tb, nodes)
	then := time.Now().Add(20 * time.Second)
	f.fill(tb, boxes, then, time.Second)
	f.instant = false
	stop := f.creating(tb, creates)
	<-time.After(time.Until(then))
	before := stop()
	stop = f.creating(tb, creates)
	for f.done() < int64(boxes) && time.Since(then) < 5*time.Minute {
		<-time.After(10 * time.Millisecond)
	}
	s := storm{took: time.Since(then)}
	during := stop()
	s.p50Before, s.p99Before, s.p50, s.p99 = part(before, .5), part(before, .99), part(during, .5), part(during, .99)
	f.mu.Lock()
	defer f.mu.Unlock()
	s.lag = part(f.lags, .99)
	if f.done() != int64(boxes) || f.loop.Stats().Failed.Load() > 0 {
		tb.Errorf("%d of %d ended, %d failures", f.done(), boxes, f.loop.Stats().Failed.Load())
	}
	return s
}

// TestStorm has 10,000 sandboxes end in the same second, on the bubble's clock: what commands take and how they wait for each
// other counts, the test's own machine does not.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := runStorm(t, 100, 10_000, 50)
		t.Logf("%+v", s)
		if s.took > time.Minute {
			t.Errorf("all had ended after %s, want a minute at most", s.took)
		}
		if s.p99 > 10*createTakes {
			t.Errorf("creates took %s (p99), before %s", s.p99, s.p99Before)
		}
	})
}

// BenchmarkStorm is the same on the machine's clock.
func BenchmarkStorm(b *testing.B) {
	for b.Loop() {
		s := runStorm(b, 100, 10_000, 50)
		b.ReportMetric(s.took.Seconds(), "s-all")
		b.ReportMetric(float64(s.lag.Milliseconds()), "ms-lag-p99")
		b.ReportMetric(float64(s.p50)/float64(s.p50Before), "x-create-p50")
		b.ReportMetric(float64(s.p99)/float64(s.p99Before), "x-create-p99")
		b.ReportMetric(float64(s.p99.Milliseconds()), "ms-create-p99")
	}
}

// cpu returns what this process has used of processors.
func cpu(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// atRest returns how much of a core this process uses, in percent.
func atRest(tb testing.TB, during time.Duration) float64 {
	tb.Helper()
	runtime.GC()
	began, used := time.Now(), cpu(tb)
	<-time.After(during)
	return 100 * float64(cpu(tb)-used) / float64(time.Since(began))
}

// BenchmarkTimers measures 100,000 sandboxes with timers: at rest with 100 nodes that report, beside what those cost without
// sandboxes, and by how much decisions are
// late while 1,000 of them end each second.
func BenchmarkTimers(b *testing.B) {
	const boxes, rest, ending = 100_000, 20 * time.Second, 10 * time.Second
	for b.Loop() {
		f := newFleet(b, 100)
		b.ReportMetric(atRest(b, rest), "%core-empty")
		f.fill(b, boxes-10_000, time.Now().Add(time.Hour), time.Hour)
		<-time.After(5 * time.Second) // what the nodes have to report of that
		b.ReportMetric(atRest(b, rest), "%core-rest")
		then := time.Now().Add(15 * time.Second)
		f.fill(b, 10_000, then, ending)
		<-time.After(time.Until(then.Add(ending + 5*time.Second)))
		f.mu.Lock()
		b.ReportMetric(float64(part(f.lags, .5).Microseconds())/1000, "ms-lag-p50")
		b.ReportMetric(float64(part(f.lags, .99).Microseconds())/1000, "ms-lag-p99")
		f.mu.Unlock()
		if f.done() != 10_000 {
			b.Errorf("%d of 10,000 have ended", f.done())
		}
	}
}
