package store

import (
	"context"
	"errors"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *Store) intents() collection[sandbox.KillIntent] {
	return newCollection[sandbox.KillIntent](s.client, "kill-intents", "intent to kill sandbox")
}

// PutKillIntent stores that a sandbox is to be killed, whatever was there.
func (s *Store) PutKillIntent(ctx context.Context, k sandbox.KillIntent) error {
	if err := checkName("sandbox id", string(k.ID)); err != nil {
		return err
	}
	_, err := s.intents().put(ctx, string(k.ID), k)
	return err
}

// KillIntents returns the sandboxes that are to be killed, in order of id.
func (s *Store) KillIntents(ctx context.Context) ([]sandbox.KillIntent, error) {
	records, _, err := s.intents().list(ctx)
	return values(records), err
}

// DeleteKillIntent deletes an intent; none is no error.
func (s *Store) DeleteKillIntent(ctx context.Context, id sandbox.ID) error {
	_, err := s.intents().remove(ctx, string(id))
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}
