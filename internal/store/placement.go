package store

import (
	"context"
	"errors"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *Store) placements() collection[sandbox.Placement] {
	return newCollection[sandbox.Placement](s.client, "placements", "placement")
}

// Placement returns where a sandbox that was moved is, or ErrNotFound.
func (s *Store) Placement(ctx context.Context, id sandbox.ID) (sandbox.Placement, error) {
	if err := checkName("sandbox id", string(id)); err != nil {
		return sandbox.Placement{}, err
	}
	r, err := s.placements().get(ctx, string(id))
	return r.Value, err
}

// Placements returns where all sandboxes are that were moved, in order of id.
func (s *Store) Placements(ctx context.Context) ([]sandbox.Placement, error) {
	records, _, err := s.placements().list(ctx)
	return values(records), err
}

// CommitPlacement stores a placement of a higher generation than the stored one.
// Errors: ErrConflict where the stored one is of the same or a higher generation; ErrUnavailable, after which it may be
// stored or not.
func (s *Store) CommitPlacement(ctx context.Context, p sandbox.Placement) error {
	when, then, err := s.placementOps(ctx, p)
	if err != nil {
		return err
	}
	return s.decide(ctx, "placement", string(p.ID), when, then)
}

// placementOps returns what CommitPlacement checks and writes.
func (s *Store) placementOps(ctx context.Context, p sandbox.Placement) ([]clientv3.Cmp, []clientv3.Op, error) {
	if err := checkName("sandbox id", string(p.ID)); err != nil {
		return nil, nil, err
	}
	all := s.placements()
	key := all.key(string(p.ID))
	var when clientv3.Cmp
	old, err := all.get(ctx, string(p.ID))
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		when = absent(key)
	case err != nil:
		return nil, nil, err
	case old.Value.Generation >= p.Generation:
		return nil, nil, sandbox.Conflictf("sandbox %s is placed at node %s by generation %d already, not below %d", p.ID,
			old.Value.Node, old.Value.Generation, p.Generation)
	default:
		when = unchanged(key, old.Revision)
		p.AddStale(append(old.Value.Stale, old.Value.Node)...)
	}
	text, err := all.encode(p)
	if err != nil {
		return nil, nil, err
	}
	return []clientv3.Cmp{when}, []clientv3.Op{clientv3.OpPut(key, text)}, nil
}

// decide runs one transaction that must find everything as it was read.
func (s *Store) decide(ctx context.Context, kind, name string, when []clientv3.Cmp, then []clientv3.Op) error {
	ok, _, err := commit(ctx, s.client, when, then)
	if err != nil {
		return err
	}
	if !ok {
		return sandbox.Conflictf("%s %q was changed or deleted by someone else meanwhile", kind, name)
	}
	return nil
}

// ChangePlacement changes what is noted beside a placement's node and generation, by compare-and-swap; it is deleted where
// change returns false. Errors: ErrNotFound.
func (s *Store) ChangePlacement(ctx context.Context, id sandbox.ID, change func(*sandbox.Placement) (keep bool)) error {
	all := s.placements()
	for range maxRetries {
		old, err := all.get(ctx, string(id))
		if err != nil {
			return err
		}
		next, key := old.Value, all.key(string(id))
		op := clientv3.OpDelete(key)
		if change(&next) {
			text, err := all.encode(next)
			if err != nil {
				return err
			}
			op = clientv3.OpPut(key, text)
		}
		err = s.decide(ctx, "placement", string(id), []clientv3.Cmp{unchanged(key, old.Revision)}, []clientv3.Op{op})
		if !isConflict(err) {
			return err
		}
	}
	return all.changed(string(id))
}
