package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// metrics is what the node counts.
type metrics struct {
	creates    *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	builds     *prometheus.HistogramVec
	saves      *prometheus.HistogramVec
	reconciled prometheus.Gauge
	reported   prometheus.Gauge
	sampled    prometheus.Gauge
}

func newMetrics(a *Agent, reg prometheus.Registerer) (*metrics, error) {
	success := func(loop string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cloister_node_loop_success_timestamp_seconds", Help: "When a loop of the node last succeeded.",
			ConstLabels: prometheus.Labels{"loop": loop},
		})
	}
	m := &metrics{
		creates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_node_creates_total", Help: "Creates by their path and result.",
		}, []string{"path", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cloister_node_create_seconds", Help: "How long successful creates took.",
			Buckets: []float64{.001, .002, .004, .006, .01, .02, .04, .08, .16, .32, .64, 1.28, 2.5, 5, 10, 30, 60},
		}, []string{"path"}),
		builds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cloister_node_build_seconds", Help: "How long builds took.",
			Buckets: []float64{1, 3, 10, 30, 60, 120, 300, 600, 1800},
		}, []string{"result"}),
		saves: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cloister_node_checkpoint_seconds", Help: "How long pauses, resumes, snapshots and rollbacks took.",
			Buckets: []float64{.01, .02, .04, .06, .08, .12, .16, .32, .64, 1.28, 2.5, 5, 10, 30, 60, 300},
		}, []string{"op", "result"}),
		reconciled: success("reconcile"), reported: success("report"), sampled: success("sample"),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.creates, m.seconds, m.builds, m.saves, m.reconciled, m.reported, m.sampled, &collector{a}} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// created counts a create.
func (m *metrics) created(path string, err error, began time.Time) {
	if path == "" {
		path = "none"
	}
	m.creates.WithLabelValues(path, resultOf(err)).Inc()
	if err == nil {
		m.seconds.WithLabelValues(path).Observe(time.Since(began).Seconds())
	}
}

// saved counts an operation with a checkpoint: pause, resume, snapshot or rollback.
func (m *metrics) saved(op string, err error, began time.Time) {
	m.saves.WithLabelValues(op, resultOf(err)).Observe(time.Since(began).Seconds())
}

func (m *metrics) built(err error, began time.Time) {
	m.builds.WithLabelValues(resultOf(err)).Observe(time.Since(began).Seconds())
}

// resultOf is the kind of an error, from a closed set.
func resultOf(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, sandbox.ErrExhausted):
		return "exhausted"
	case errors.Is(err, sandbox.ErrInvalid):
		return "invalid"
	case errors.Is(err, sandbox.ErrUnavailable):
		return "unavailable"
	case errors.Is(err, sandbox.ErrUnsupported):
		return "unsupported"
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	}
	return "error"
}

// collector reads the present numbers when somebody asks.
type collector struct{ a *Agent }

//nolint:gochecknoglobals // descriptions, never written
var (
	descSandboxes = prometheus.NewDesc("cloister_node_sandboxes", "Sandboxes of the node by state.", []string{"state"}, nil)
	descWarm      = prometheus.NewDesc("cloister_node_warm_sandboxes", "Warm sandboxes: ready ones and those being made.", []string{"phase"}, nil)
	descQueue     = prometheus.NewDesc("cloister_node_create_queue_sandboxes", "Creates that wait for their turn to start.", nil, nil)
	descQueueAge  = prometheus.NewDesc("cloister_node_create_queue_age_seconds", "How long the first of them has waited.", nil, nil)
	descAllocated = prometheus.NewDesc("cloister_node_allocated", "What sandboxes hold, the warm ones included.", []string{"resource"}, nil)
	descCapacity  = prometheus.NewDesc("cloister_node_capacity", "What sandboxes may hold.", []string{"resource"}, nil)
	descSaves     = prometheus.NewDesc("cloister_node_checkpoints", "Checkpoints of the node by what they are for.", []string{"use"}, nil)
	descSaveBytes = prometheus.NewDesc("cloister_node_checkpoint_bytes", "What all checkpoints occupy on the disk.", nil, nil)
	descOutbox    = prometheus.NewDesc("cloister_node_unreported_changes", "Changes that the server has not acknowledged.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descSandboxes, descWarm, descQueue, descQueueAge, descAllocated, descCapacity, descSaves, descSaveBytes, descOutbox} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := map[sandbox.State]int{}
	for _, in := range c.a.instances() {
		if r := in.record(); !r.Warm {
			count[r.State]++
		}
	}
	for s := range states {
		send(descSandboxes, float64(count[s]), string(s))
	}
	ready, filling := c.a.warmCount()
	send(descWarm, float64(ready), "ready")
	send(descWarm, float64(filling), "filling")
	waiting, age := c.a.gate.waiting()
	send(descQueue, float64(waiting))
	send(descQueueAge, age.Seconds())
	l := c.a.journal.Ledger()
	resources := func(d *prometheus.Desc, r sandbox.Resources) {
		send(d, float64(r.MilliCPU)/1000, "cpu_cores")
		send(d, float64(r.MemoryBytes), "memory_bytes")
		send(d, float64(r.DiskBytes), "disk_bytes")
	}
	resources(descAllocated, l.Allocated.Resources)
	resources(descCapacity, l.Capacity)
	pauses, all := 0, c.a.saves.List()
	for i := range all {
		if all[i].Pause {
			pauses++
		}
	}
	send(descSaves, float64(pauses), "pause")
	send(descSaves, float64(len(all)-pauses), "start")
	send(descSaveBytes, float64(c.a.saves.Bytes()))
	send(descOutbox, float64(l.Sequence-l.Acknowledged))
}

// warmCount returns how many warm sandboxes are ready and being made.
func (a *Agent) warmCount() (ready, filling int) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, p := range a.pools {
		ready += len(p.ready)
		filling += p.filling
	}
	return ready, filling
}
