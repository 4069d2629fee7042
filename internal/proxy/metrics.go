package proxy

import (
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// metrics counts what passes. There are no labels for single sandboxes.
type metrics struct {
	requests *prometheus.CounterVec
	failures *prometheus.CounterVec
	open     prometheus.Gauge
	duration prometheus.Histogram
	dials    *prometheus.CounterVec
	waiting  prometheus.Gauge
	wakes    *prometheus.CounterVec
	in, out  prometheus.Counter
	inFlight atomic.Int64          // as open, for those who ask
	byClass  [6]prometheus.Counter // requests, by the first digit of their status; 0 for none
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "cloister_proxy_bytes_total", Help: "Bytes of bodies moved, by direction: in (to sandboxes) or out.",
	}, []string{"direction"})
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_proxy_requests_total", Help: "Requests, by class of the status code sent.",
		}, []string{"code"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_proxy_failures_total", Help: "Requests that the proxy answered in a guest's stead, by cause.",
		}, []string{"cause"}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cloister_proxy_requests_in_flight", Help: "Requests that are open now, streams and upgraded connections included.",
		}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "cloister_proxy_request_duration_seconds", Help: "Time from a request's head to the end of its answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 600, 3600},
		}),
		dials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_proxy_dials_total", Help: "Connections opened to guests, by result.",
		}, []string{"result"}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cloister_proxy_requests_waiting", Help: "Requests that wait for a sandbox that is on its way to run.",
		}),
		wakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_proxy_wakes_total", Help: "Paused sandboxes that requests made run, by result: ok, refused or error.",
		}, []string{"result"}),
		in: bytes.WithLabelValues("in"), out: bytes.WithLabelValues("out"),
	}
	for i := range m.byClass {
		m.byClass[i] = m.requests.WithLabelValues(codeClass(i * 100))
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.failures, m.open, m.duration, m.dials, m.waiting, m.wakes, bytes} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the proxy's metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) received(n int) { m.in.Add(float64(n)) }
func (m *metrics) sent(n int)     { m.out.Add(float64(n)) }

func (m *metrics) dialed(err error) {
	result := "ok"
	switch {
	case err == nil:
	case errors.Is(err, sandbox.ErrNotFound):
		result = "not_found"
	case errors.Is(err, sandbox.ErrUnavailable):
		result = "unavailable"
	default:
		result = "error"
	}
	m.dials.WithLabelValues(result).Inc()
}

func (m *metrics) woken(err error) {
	result := "ok"
	switch {
	case err == nil:
	case errors.Is(err, sandbox.ErrConflict), errors.Is(err, sandbox.ErrNotFound), errors.Is(err, sandbox.ErrExhausted):
		result = "refused"
	default:
		result = "error"
	}
	m.wakes.WithLabelValues(result).Inc()
}

// outcome is what a request came to; its fields are written on the request's own goroutine.
type outcome struct {
	metrics *metrics
	start   time.Time
	status  int
	failure cause
}

func (m *metrics) begin() outcome {
	m.open.Inc()
	m.inFlight.Add(1)
	return outcome{metrics: m, start: time.Now()}
}

func (o *outcome) end() {
	o.metrics.open.Dec()
	o.metrics.inFlight.Add(-1)
	o.metrics.duration.Observe(time.Since(o.start).Seconds())
	o.metrics.byClass[classIndex(o.status)].Inc()
	if o.failure != "" {
		o.metrics.failures.WithLabelValues(string(o.failure)).Inc()
	}
}

func classIndex(status int) int {
	if status < 100 || status >= 600 || status == statusClientGone {
		return 0
	}
	return status / 100
}

// codeClass is one of 1xx to 5xx, or "none" where no status was sent.
func codeClass(status int) string {
	if i := classIndex(status); i > 0 {
		return strconv.Itoa(i) + "xx"
	}
	return "none"
}
