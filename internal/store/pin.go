package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *Store) pins() collection[sandbox.Pin] {
	return newCollection[sandbox.Pin](s.client, "pins", "idempotency key")
}

// Pin stores which node a request is sent to, for the time ttl, unless its key is pinned already; it returns what is
// stored, and whether that was there before.
func (s *Store) Pin(ctx context.Context, p sandbox.Pin, ttl time.Duration) (kept sandbox.Pin, was bool, err error) {
	if err := checkName("idempotency key", p.Key); err != nil {
		return p, false, err
	}
	all := s.pins()
	for range maxRetries {
		old, err := all.get(ctx, p.Key)
		if err == nil || !errors.Is(err, sandbox.ErrNotFound) {
			return old.Value, true, err
		}
		err = s.createPin(ctx, p, ttl)
		if !isConflict(err) {
			return p, false, err
		}
	}
	return p, false, all.changed(p.Key)
}

func (s *Store) createPin(ctx context.Context, p sandbox.Pin, ttl time.Duration) error {
	all := s.pins()
	text, err := all.encode(p)
	if err != nil {
		return err
	}
	grant, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	lease, err := s.client.Grant(grant, int64(max(ttl, time.Second)/time.Second))
	if err != nil {
		return fmt.Errorf("pin idempotency key: %w", explain(err))
	}
	key := all.key(p.Key)
	err = s.decide(ctx, all.kind, p.Key, []clientv3.Cmp{absent(key)}, []clientv3.Op{clientv3.OpPut(key, text, clientv3.WithLease(lease.ID))})
	if err != nil {
		release, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
		defer cancel()
		_, _ = s.client.Revoke(release, lease.ID) // it ends by itself
	}
	return err
}

// MovePin changes the node of a pin that is as from says; its time goes on. Errors: ErrNotFound, ErrConflict.
func (s *Store) MovePin(ctx context.Context, from sandbox.Pin, to sandbox.NodeID) error {
	all := s.pins()
	old, err := all.get(ctx, from.Key)
	if err != nil {
		return err
	}
	if old.Value != from {
		return all.changed(from.Key)
	}
	next := from
	next.Node = to
	text, err := all.encode(next)
	if err != nil {
		return err
	}
	key := all.key(from.Key)
	return s.decide(ctx, all.kind, from.Key, []clientv3.Cmp{unchanged(key, old.Revision)}, []clientv3.Op{clientv3.OpPut(key, text, clientv3.WithIgnoreLease())})
}

// Unpin deletes a pin, so that its key may be used anew; none is no error.
func (s *Store) Unpin(ctx context.Context, key string) error {
	_, err := s.pins().remove(ctx, key)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}
