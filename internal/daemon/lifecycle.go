package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/lifecycle"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

const (
	// lifecycleOffice is what servers are elected to: whoever has it decides about the ends of sandboxes.
	lifecycleOffice = "lifecycle"
	// lifecycleLease is how long after a leader died another one leads; nodes see to fixed ends by themselves until then.
	lifecycleLease = 10 * time.Second
	// campaignRetry is the wait after an election that could not be held.
	campaignRetry = time.Second
)

// leader decides about the ends of sandboxes for as long as this server is elected to.
type leader struct {
	store   *store.Store
	control *control.Control
	loop    *lifecycle.Loop
	log     *slog.Logger
	leading prometheus.Gauge
}

func newLeader(cfg *config.Config, st *store.Store, ctl *control.Control, log *slog.Logger, reg prometheus.Registerer) *leader {
	loop := lifecycle.New(lifecycle.Config{
		Cluster: dueSandboxes{ctl}, Log: log,
		Policy: lifecycle.Policy{PauseGrace: cfg.LifecyclePauseGrace, Recheck: cfg.LifecycleRecheck},
	})
	return &leader{store: st, control: ctl, loop: loop, log: log, leading: lifecycleMetrics(reg, loop)}
}

// lifecycleMetrics counts what the loop does, and returns the gauge of whether it leads.
func lifecycleMetrics(reg prometheus.Registerer, loop *lifecycle.Loop) prometheus.Gauge {
	with, s := promauto.With(reg), loop.Stats()
	for result, n := range map[string]func() int64{
		"killed": s.Killed.Load, "paused": s.Paused.Load, "refused": s.Refused.Load, "failed": s.Failed.Load,
	} {
		with.NewCounterFunc(prometheus.CounterOpts{
			Name: "cloister_lifecycle_decisions_total", Help: "Decisions about ends of sandboxes, by what became of them.",
			ConstLabels: prometheus.Labels{"result": result},
		}, func() float64 { return float64(n()) })
	}
	with.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "cloister_lifecycle_waiting_sandboxes", Help: "Sandboxes whose end is waited for.",
	}, func() float64 { return float64(loop.Waiting()) })
	with.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "cloister_lifecycle_last_run_timestamp_seconds", Help: "When the loop last looked for ends that have come; 0: never.",
	}, func() float64 { return time.Duration(s.LastRun.Load()).Seconds() })
	lag := with.NewHistogram(prometheus.HistogramOpts{
		Name: "cloister_lifecycle_lag_seconds", Help: "By how much decisions were later than the ends that they are about.",
		Buckets: []float64{.001, .005, .01, .05, .1, .25, .5, 1, 2.5, 5, 10, 60},
	})
	s.Lag = func(d time.Duration) { lag.Observe(d.Seconds()) }
	return with.NewGauge(prometheus.GaugeOpts{
		Name: "cloister_lifecycle_leading", Help: "1 while this server decides about the ends of sandboxes.",
	})
}

// run stands for election again and again, and leads while it is elected, until ctx ends.
func (l *leader) run(ctx context.Context) error {
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read the host's name: %w", err)
	}
	l.control.FollowEnds(l.loop.Observe)
	for ctx.Err() == nil {
		if err := l.term(ctx, fmt.Sprintf("%s/%d", host, os.Getpid())); err != nil && ctx.Err() == nil {
			l.log.LogAttrs(ctx, slog.LevelWarn, "nobody may be seeing to the ends of sandboxes but their nodes, trying again",
				slog.Duration("in", campaignRetry), slog.Any("err", err))
			sleepUntil(ctx, time.Now().Add(campaignRetry))
		}
	}
	return nil
}

// term waits for one election, and leads until that ends.
func (l *leader) term(ctx context.Context, name string) error {
	term, err := l.store.Campaign(ctx, lifecycleOffice, name, lifecycleLease)
	if err != nil {
		return err
	}
	l.log.LogAttrs(ctx, slog.LevelInfo, "this server sees to the ends of sandboxes")
	termCtx, cancel := term.Context(ctx)
	defer cancel()
	l.control.LeadEnds(true)
	l.leading.Set(1)
	l.loop.Lead(termCtx)
	l.leading.Set(0)
	l.control.LeadEnds(false)
	return term.Resign(ctx)
}

func (l *leader) start(ctx context.Context, loops *errgroup.Group) {
	loops.Go(func() error { return l.run(ctx) })
}

// dueSandboxes is what lifecycle knows of the cluster.
type dueSandboxes struct{ control *control.Control }

// Item returns what is known of a sandbox.
func (d dueSandboxes) Item(id sandbox.ID) (lifecycle.Item, bool) {
	due, ok := d.control.Due(id)
	return lifecycle.Item{
		Sandbox: due.Sandbox, Known: due.Known,
		Activity: lifecycle.Activity{Open: due.Open, Last: due.Last, Busy: due.Working, Complete: due.Complete},
	}, ok
}

// Kill ends a sandbox.
func (d dueSandboxes) Kill(ctx context.Context, v lifecycle.Verdict) error {
	return d.control.EndDue(ctx, decision(v))
}

// Pause pauses a sandbox.
func (d dueSandboxes) Pause(ctx context.Context, v lifecycle.Verdict) error {
	return d.control.PauseDue(ctx, decision(v))
}

func decision(v lifecycle.Verdict) control.Decision {
	return control.Decision{ID: v.ID, Generation: v.Generation, Reason: v.Reason, Forced: v.Forced}
}
