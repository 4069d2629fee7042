package v1

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
)

func (s *server) listKeys(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListKeys(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, keyToWire))
}

func (s *server) createKey(w http.ResponseWriter, r *http.Request) error {
	var body client.CreateKey
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	k, secret, err := s.control.CreateKey(r.Context(), body.Name)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, client.CreatedKey{Key: keyToWire(k), Secret: secret})
}

func (s *server) revokeKey(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.RevokeKey(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}
