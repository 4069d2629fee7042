package store

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *Store) nodeSettings() collection[sandbox.NodeSettings] {
	return newCollection[sandbox.NodeSettings](s.client, "node-settings", "settings of node")
}

// NodeSettings returns what the administrator set for nodes, those without settings left out.
func (s *Store) NodeSettings(ctx context.Context) (map[sandbox.NodeID]sandbox.NodeSettings, error) {
	records, _, err := s.nodeSettings().list(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[sandbox.NodeID]sandbox.NodeSettings, len(records))
	for _, r := range records {
		out[sandbox.NodeID(r.Name)] = r.Value
	}
	return out, nil
}

// UpdateNodeSettings changes a node's settings by compare-and-swap: change sees the newest ones, empty where there are
// none, and may be called again when another writer was faster. Its error is returned as it is.
func (s *Store) UpdateNodeSettings(
	ctx context.Context, id sandbox.NodeID, change func(*sandbox.NodeSettings) error,
) (sandbox.NodeSettings, error) {
	if err := checkName("node id", string(id)); err != nil {
		return sandbox.NodeSettings{}, err
	}
	all := s.nodeSettings()
	for range maxRetries {
		old, err := all.get(ctx, string(id))
		missing := errors.Is(err, sandbox.ErrNotFound)
		if err != nil && !missing {
			return sandbox.NodeSettings{}, err
		}
		next := old.Value.Clone()
		if err := change(&next); err != nil {
			return sandbox.NodeSettings{}, err
		}
		if missing {
			_, err = all.create(ctx, string(id), next)
		} else {
			_, err = all.swap(ctx, old, next)
		}
		if !isConflict(err) {
			return next, err
		}
	}
	return sandbox.NodeSettings{}, all.changed(string(id))
}

// policyName is the key of the one scheduling policy.
const policyName = "scheduler"

func (s *Store) policies() collection[json.RawMessage] {
	return newCollection[json.RawMessage](s.client, "policies", "policy")
}

// SchedulerPolicy returns the scheduling policy that was stored, as JSON, or ErrNotFound.
func (s *Store) SchedulerPolicy(ctx context.Context) (json.RawMessage, error) {
	r, err := s.policies().get(ctx, policyName)
	return r.Value, err
}

// PutSchedulerPolicy stores a scheduling policy; nil deletes it, also where there is none.
func (s *Store) PutSchedulerPolicy(ctx context.Context, policy json.RawMessage) error {
	if policy != nil {
		_, err := s.policies().put(ctx, policyName, policy)
		return err
	}
	_, err := s.policies().remove(ctx, policyName)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}

// DeleteNodeSettings deletes a node's settings; none is no error.
func (s *Store) DeleteNodeSettings(ctx context.Context, id sandbox.NodeID) error {
	_, err := s.nodeSettings().remove(ctx, string(id))
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}
