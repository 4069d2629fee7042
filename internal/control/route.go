package control

import (
	"context"
	"fmt"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Route says where a sandbox is and whether it can be reached; for one that ended lately it says why it cannot.
// Errors: ErrNotFound, ErrUnavailable.
func (c *Control) Route(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	box, err := c.locate(ctx, id)
	if err != nil {
		return sandbox.Route{}, err
	}
	return box.Route(), nil
}

// Await returns the route of a sandbox as soon as it says something else than seen. Errors: those of Route, and ctx's.
func (c *Control) Await(ctx context.Context, id sandbox.ID, seen sandbox.Route) (sandbox.Route, error) {
	for {
		w := c.routes.await(id)
		r, err := c.Route(ctx, id)
		if err != nil || r.News(seen) {
			c.routes.leave(id, w)
			return r, err
		}
		select {
		case <-w.news:
		case <-ctx.Done():
			c.routes.leave(id, w)
			return r, fmt.Errorf("wait for sandbox %s: %w", id, ctx.Err())
		}
	}
}
