package control

import (
	"context"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Connect returns a running sandbox for use and sees that it lives at least for the given time from now.
// Errors: ErrInvalid, ErrNotFound.
func (c *Control) Connect(ctx context.Context, id sandbox.ID, timeout time.Duration) (sandbox.Sandbox, error) {
	return c.Extend(ctx, id, timeout)
}
