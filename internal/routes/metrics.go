package routes

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics says how far the table can be believed.
type metrics struct {
	snapshots prometheus.Counter
	changes   prometheus.Counter
	broken    prometheus.Counter
	lookups   *prometheus.CounterVec
	reports   *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer, t *Table) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		snapshots: counter("cloister_routes_snapshots_total", "Whole routing tables taken from a server."),
		changes:   counter("cloister_routes_changes_total", "Routes taken from a server, those of whole tables included."),
		broken:    counter("cloister_routes_broken_total", "Times that the following of a server broke off."),
		lookups: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_routes_lookups_total", Help: "Questions about sandboxes that the table lacks, by result: found, not_found, unavailable or limited.",
		}, []string{"result"}),
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_routes_reports_total", Help: "Reports of activity, by result: acknowledged, refused or failed.",
		}, []string{"result"}),
	}
	if r == nil {
		return m, nil
	}
	known := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "cloister_routes_known_sandboxes", Help: "Sandboxes in the routing table.",
	}, func() float64 { return float64(t.size()) })
	stale := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "cloister_routes_stale_seconds", Help: "How long no server has been followed; 0 while one is.",
	}, func() float64 {
		since := t.StaleSince()
		if since.IsZero() {
			return 0
		}
		return time.Since(since).Seconds()
	})
	for _, c := range []prometheus.Collector{m.snapshots, m.changes, m.broken, m.lookups, m.reports, known, stale} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the routing table's metrics: %w", err)
		}
	}
	return m, nil
}

func (t *Table) size() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.routes)
}
