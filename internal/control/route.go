package control

import (
	"context"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Route is what the proxy needs to know of a sandbox.
type Route struct {
	Node       sandbox.NodeID
	State      sandbox.State
	Reason     string
	Generation int64
	// Secure means that the agent inside demands a token.
	Secure bool
}

// Route says where a sandbox is and whether it can be reached; for one that ended lately it says why it cannot.
// Errors: ErrNotFound, ErrUnavailable.
func (c *Control) Route(ctx context.Context, id sandbox.ID) (Route, error) {
	box, err := c.locate(ctx, id)
	if err != nil {
		return Route{}, err
	}
	return Route{Node: box.NodeID, State: box.State, Reason: box.Reason, Generation: box.Generation, Secure: box.Secure}, nil
}
