package v1

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
)

func (s *server) status(w http.ResponseWriter, r *http.Request) error {
	st, err := s.control.Status(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, statusToWire(st))
}
