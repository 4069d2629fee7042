package store

import (
	"context"
	"errors"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *Store) stored() collection[sandbox.Stored] {
	return newCollection[sandbox.Stored](s.client, "stored", "checkpoint in the bucket")
}

// Stored returns the checkpoints that may be in the bucket, in order of id.
func (s *Store) Stored(ctx context.Context) ([]sandbox.Stored, error) {
	records, _, err := s.stored().list(ctx)
	return values(records), err
}

// PutStored stores that a checkpoint may be in the bucket, whatever was there.
func (s *Store) PutStored(ctx context.Context, one sandbox.Stored) error {
	if err := checkName("checkpoint id", one.Checkpoint); err != nil {
		return err
	}
	_, err := s.stored().put(ctx, one.Checkpoint, one)
	return err
}

// DeleteStored deletes what PutStored stored; none is no error.
func (s *Store) DeleteStored(ctx context.Context, checkpoint string) error {
	_, err := s.stored().remove(ctx, checkpoint)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}
