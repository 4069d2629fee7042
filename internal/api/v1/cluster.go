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

func (s *server) listNodes(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListNodes(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, nodeToWire))
}

func (s *server) getNode(w http.ResponseWriter, r *http.Request) error {
	n, err := s.control.GetNode(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, nodeToWire(n))
}
