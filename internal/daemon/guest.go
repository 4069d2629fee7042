package daemon

import (
	"context"
	"net"
	"net/http"

	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// dialer reaches into the sandboxes of this process's node.
type dialer interface {
	DialGuest(ctx context.Context, id sandbox.ID, port uint16) (net.Conn, error)
}

// guestDialer connects to the agent inside one sandbox, whatever address is asked for.
func guestDialer(d dialer, id sandbox.ID) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialGuest(ctx, id, proxy.GuestAgentPort)
	}
}

// withToken shows the agent inside a sandbox its access token.
type withToken struct {
	next  http.RoundTripper
	token string
}

// RoundTrip sends the request with the token.
func (t withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Access-Token", t.token)
	return t.next.RoundTrip(r)
}
