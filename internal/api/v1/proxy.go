package v1

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
)

func (s *server) listProxies(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListProxies(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, proxyToWire))
}

func (s *server) removeProxy(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.RemoveProxy(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func proxyToWire(p control.Proxy) client.Proxy {
	w := client.Proxy{
		ID: p.ID, Name: p.Name, State: p.State, Version: p.Version, Address: p.Address, Since: p.Since.UTC(), HeardAt: p.HeardAt.UTC(),
		Connections: p.Connections, Requests: p.Requests,
	}
	if p.Behind >= 0 {
		w.Behind = &p.Behind
	}
	return w
}
