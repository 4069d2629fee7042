package v1

import (
	"math"
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) events(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	q := control.EventQuery{Type: values.Get("type")}
	if id := values.Get("sandbox"); id != "" {
		if q.SandboxID, err = sandbox.ParseID(id); err != nil {
			return err
		}
	}
	if q.Since, err = exchange.Time(values, "since"); err != nil {
		return err
	}
	limit, err := exchange.Int(values, "limit", 1, control.MaxEvents, 100)
	if err != nil {
		return err
	}
	q.Limit = int(limit)
	if q.After, err = exchange.Int(values, "after", 0, math.MaxInt64, 0); err != nil {
		return err
	}
	all, err := s.control.Events(r.Context(), q)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, eventToWire))
}
