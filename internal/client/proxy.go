package client

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Proxy is one entry of GET /v1/proxies: a proxy that is there, or that has joined.
type Proxy struct {
	// ID is "local" of the proxy in the server's own process.
	ID   string `json:"id"`
	Name string `json:"name"`
	// State is ready, starting (it has not got the routing table yet), leaving (it takes no new requests), silent (it does not
	// report, and may go on with what it has), unreachable (likewise, of one that the server dials; its ID is empty where it was not
	// reached yet) or absent.
	State   string `json:"state"`
	Version string `json:"version"`
	// Address is the URL by which clients reach it, as it says.
	Address string `json:"address,omitempty"`
	// Since is when it started, HeardAt when it last reported.
	Since   time.Time `json:"since,omitzero"`
	HeardAt time.Time `json:"heard_at,omitzero"`
	// Behind is how many changes of the routing table it has not taken; left out where that is not known.
	Behind *int64 `json:"behind,omitempty"`
	// Connections are clients', Requests those that are open, streams included.
	Connections int `json:"connections"`
	Requests    int `json:"requests"`
}

// Proxies returns the proxies, in order of name.
func (c *Client) Proxies(ctx context.Context) ([]Proxy, error) {
	return get[[]Proxy](ctx, c, "/v1/proxies")
}

// RemoveProxy takes a proxy that has joined out of the cluster: its certificates are worth nothing from then on.
func (c *Client) RemoveProxy(ctx context.Context, idOrName string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/proxies/"+url.PathEscape(idOrName), nil, nil)
	return err
}
