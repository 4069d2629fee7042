package e2b

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) metrics(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	start, err := exchange.UnixTime(values, "start", time.Second)
	if err != nil {
		return err
	}
	end, err := exchange.UnixTime(values, "end", time.Second)
	if err != nil {
		return err
	}
	samples, err := s.control.Metrics(r.Context(), id, start, end)
	if err != nil {
		return err
	}
	out := make([]metricWire, 0, len(samples))
	for _, m := range samples {
		out = append(out, metricToWire(m))
	}
	return exchange.JSON(w, http.StatusOK, out)
}

// maxIDs bounds how many sandboxes one request asks the metrics of.
const maxIDs = 100

// manyMetrics returns the newest sample of each sandbox; those that are gone are left out.
func (s *server) manyMetrics(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	ids := strings.FieldsFunc(strings.Join(values["sandbox_ids"], ","), func(r rune) bool { return r == ',' })
	if len(ids) == 0 || len(ids) > maxIDs {
		return sandbox.Invalidf("sandbox_ids names %d sandboxes: want 1 to %d ids with commas", len(ids), maxIDs)
	}
	out := struct {
		Sandboxes map[string]metricWire `json:"sandboxes"`
	}{Sandboxes: make(map[string]metricWire, len(ids))}
	for _, text := range ids {
		id, err := sandbox.ParseID(text)
		if err != nil {
			return err
		}
		samples, err := s.control.Metrics(r.Context(), id, time.Time{}, time.Time{})
		if errors.Is(err, sandbox.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if len(samples) > 0 {
			out.Sandboxes[text] = metricToWire(samples[len(samples)-1])
		}
	}
	return exchange.JSON(w, http.StatusOK, out)
}
