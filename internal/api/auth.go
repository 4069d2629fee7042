package api

import (
	"context"
	"errors"
	"fmt"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// authenticator knows keys. It returns the id of the key for the log, and ErrDenied or ErrNotFound for a key that opens
// nothing. It is asked on every request.
type authenticator interface {
	Authenticate(ctx context.Context, key string) (keyID string, err error)
}

// localAdmin marks a request that came over the machine's own socket, which only root can open.
type localAdmin struct{}

// WithLocalAdmin marks the requests of a connection as the administrator's; for the server of the local socket alone.
func WithLocalAdmin(ctx context.Context) context.Context {
	return context.WithValue(ctx, localAdmin{}, true)
}

const localKeyID = "local"

// authenticate says who is calling, or fails with ErrUnauthenticated.
func (e *edge) authenticate(op *operation) error {
	if local, _ := op.request.Context().Value(localAdmin{}).(bool); local {
		op.keyID = localKeyID
		return nil
	}
	key, err := auth.FromRequest(op.request.Header)
	if err != nil {
		return fmt.Errorf("%w: %w", exchange.ErrUnauthenticated, err)
	}
	id, err := e.auth.Authenticate(op.request.Context(), key)
	if errors.Is(err, sandbox.ErrNotFound) || errors.Is(err, sandbox.ErrDenied) || errors.Is(err, sandbox.ErrInvalid) {
		return fmt.Errorf("%w: this API key is not known here, or has been revoked", exchange.ErrUnauthenticated)
	}
	if err != nil {
		return fmt.Errorf("check the API key: %w", err)
	}
	op.keyID = id
	return nil
}
