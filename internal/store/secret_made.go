package store

import (
	"context"
	"errors"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// MadeSecret returns the cluster's secret of that name and, where there is none, keeps what fresh returns, 1 to 4,096 bytes;
// every caller on every server gets the same bytes.
func (s *Store) MadeSecret(ctx context.Context, name string, fresh func() ([]byte, error)) ([]byte, error) {
	if err := checkName("secret", name); err != nil {
		return nil, err
	}
	for range maxRetries {
		r, err := s.secrets.get(ctx, name)
		if err == nil {
			return s.seal.open(name, r.Value)
		}
		if !errors.Is(err, sandbox.ErrNotFound) {
			return nil, err
		}
		plain, err := fresh()
		if err != nil {
			return nil, err
		}
		if len(plain) < 1 || len(plain) > maxSecretBytes {
			return nil, sandbox.Invalidf("secret %q of %d bytes: want 1 to %d", name, len(plain), maxSecretBytes)
		}
		_, err = s.secrets.create(ctx, name, s.seal.seal(name, plain))
		if err == nil {
			return plain, nil
		}
		if !isConflict(err) {
			return nil, err
		}
	}
	return nil, s.secrets.changed(name)
}
