package e2b

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
)

// unsupported returns the contract's operations that this version cannot do. They answer 501 with what they are, so
// that nobody looks for a mistake in a URL.
func (s *server) unsupported() []exchange.Route {
	return []exchange.Route{
		{Method: "PUT", Path: "/sandboxes/{id}/network", Handle: s.cannot("changing the network of a running sandbox")},
		{Method: "POST", Path: "/templates", Handle: cannot("building a template from an image that the client pushes")},
		{Method: "GET", Path: "/volumes", Handle: cannot("listing volumes")},
		{Method: "POST", Path: "/volumes", Handle: cannot("making a volume")},
		{Method: "GET", Path: "/volumes/{id}", Handle: cannot("reading a volume")},
		{Method: "DELETE", Path: "/volumes/{id}", Handle: cannot("deleting a volume")},
		{Method: "GET", Path: "/secrets", Handle: cannot("listing secrets")},
		{Method: "POST", Path: "/secrets", Handle: cannot("keeping a secret")},
		{Method: "GET", Path: "/secrets/{id}", Handle: cannot("reading a secret")},
		{Method: "POST", Path: "/secrets/{id}", Handle: cannot("changing a secret")},
		{Method: "DELETE", Path: "/secrets/{id}", Handle: cannot("deleting a secret")},
		{Method: "GET", Path: "/teams/{id}/metrics", Handle: cannot("reading a team's metrics")},
		{Method: "GET", Path: "/teams/{id}/metrics/max", Handle: cannot("reading a team's metrics")},
	}
}

func cannot(what string) exchange.Handler {
	return func(http.ResponseWriter, *http.Request) error { return notSupported(what) }
}

// cannot is for an operation on a sandbox: one that does not exist is still a 404.
func (s *server) cannot(what string) exchange.Handler {
	return func(_ http.ResponseWriter, r *http.Request) error {
		id, err := sandboxID(r)
		if err != nil {
			return err
		}
		if _, err := s.control.Get(r.Context(), id); err != nil {
			return err
		}
		return notSupported(what)
	}
}
