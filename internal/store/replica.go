package store

import (
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *Store) replicas() collection[sandbox.Replica] {
	return newCollection[sandbox.Replica](s.client, "replicas", "replica")
}

// Replicas returns the paused sandboxes that can be brought back without their nodes, in order of id.
func (s *Store) Replicas(ctx context.Context) ([]sandbox.Replica, error) {
	records, _, err := s.replicas().list(ctx)
	return values(records), err
}

// CreateReplica stores a record that must not exist, else ErrConflict.
func (s *Store) CreateReplica(ctx context.Context, r sandbox.Replica) error {
	if err := checkName("sandbox id", string(r.ID)); err != nil {
		return err
	}
	_, err := s.replicas().create(ctx, string(r.ID), r)
	return err
}

// UpdateReplica replaces exactly the record old. Errors: ErrNotFound, ErrConflict where it is not as old says;
// ErrUnavailable, after which it may be replaced or not.
func (s *Store) UpdateReplica(ctx context.Context, old, next sandbox.Replica) error {
	when, then, err := s.replicaOps(ctx, old, &next)
	if err != nil {
		return err
	}
	return s.decide(ctx, "replica", string(old.ID), when, then)
}

// RemoveReplica deletes exactly the record old. Errors: those of UpdateReplica.
func (s *Store) RemoveReplica(ctx context.Context, old sandbox.Replica) error {
	when, then, err := s.replicaOps(ctx, old, nil)
	if err != nil {
		return err
	}
	return s.decide(ctx, "replica", string(old.ID), when, then)
}

// MoveReplica replaces exactly the record old and commits the placement at the new home, both or nothing.
// Errors: those of UpdateReplica and CommitPlacement.
func (s *Store) MoveReplica(ctx context.Context, old, next sandbox.Replica, p sandbox.Placement) error {
	when, then, err := s.replicaOps(ctx, old, &next)
	if err != nil {
		return err
	}
	more, ops, err := s.placementOps(ctx, p)
	if err != nil {
		return err
	}
	return s.decide(ctx, "replica", string(old.ID), append(when, more...), append(then, ops...))
}

// replicaOps returns the condition that a record is as old says, and the write of next, or the deletion.
func (s *Store) replicaOps(ctx context.Context, old sandbox.Replica, next *sandbox.Replica) ([]clientv3.Cmp, []clientv3.Op, error) {
	all := s.replicas()
	at, err := all.get(ctx, string(old.ID))
	if err != nil {
		return nil, nil, err
	}
	if !at.Value.Same(old) {
		return nil, nil, all.changed(string(old.ID))
	}
	key := all.key(string(old.ID))
	when := []clientv3.Cmp{unchanged(key, at.Revision)}
	if next == nil {
		return when, []clientv3.Op{clientv3.OpDelete(key)}, nil
	}
	text, err := all.encode(*next)
	if err != nil {
		return nil, nil, err
	}
	return when, []clientv3.Op{clientv3.OpPut(key, text)}, nil
}
