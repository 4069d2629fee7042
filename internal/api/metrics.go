package api

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics counts requests. The labels come from the list of routes and from HTTP's statuses.
type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	inFlight prometheus.Gauge
}

func newMetrics(to prometheus.Registerer) *metrics {
	with := promauto.With(to)
	return &metrics{
		requests: with.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_api_requests_total", Help: "Requests answered, by operation and HTTP status.",
		}, []string{"op", "status"}),
		seconds: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cloister_api_request_seconds", Help: "Time from a request's head to the end of its answer, by operation.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}, []string{"op"}),
		inFlight: with.NewGauge(prometheus.GaugeOpts{
			Name: "cloister_api_requests_in_flight", Help: "Requests being served.",
		}),
	}
}

func (m *metrics) observe(op *operation) {
	m.requests.WithLabelValues(op.route(), statusText(op.w.status)).Inc()
	m.seconds.WithLabelValues(op.route()).Observe(time.Since(op.began).Seconds())
}
