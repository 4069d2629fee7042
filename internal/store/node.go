package store

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxName is the longest key of a record, in bytes.
const maxName = 128

// checkName refuses what cannot be a record's key.
func checkName(what, name string) error {
	if name == "" || len(name) > maxName {
		return sandbox.Invalidf("%s %.40q: want 1 to %d characters", what, name, maxName)
	}
	for _, r := range name {
		if r <= ' ' || r > '~' {
			return sandbox.Invalidf("%s %.40q: want printable ASCII without spaces, found %q", what, name, r)
		}
	}
	return nil
}

// PutNode stores a node's record, whatever was there.
func (s *Store) PutNode(ctx context.Context, n sandbox.Node) error {
	if err := checkName("node id", string(n.ID)); err != nil {
		return err
	}
	_, err := s.nodes.put(ctx, string(n.ID), n)
	return err
}

// Node returns a node, or ErrNotFound.
func (s *Store) Node(ctx context.Context, id sandbox.NodeID) (sandbox.Node, error) {
	r, err := s.nodes.get(ctx, string(id))
	return r.Value, err
}

// UpdateNode changes a node by compare-and-swap: change sees the newest record and may be called again when another
// writer was faster. Its error is returned as it is.
func (s *Store) UpdateNode(ctx context.Context, id sandbox.NodeID, change func(*sandbox.Node) error) (sandbox.Node, error) {
	for range maxRetries {
		r, err := s.nodes.get(ctx, string(id))
		if err != nil {
			return sandbox.Node{}, err
		}
		next := r.Value
		if err := change(&next); err != nil {
			return sandbox.Node{}, err
		}
		next.ID = id
		_, err = s.nodes.swap(ctx, r, next)
		if !isConflict(err) {
			return next, err
		}
	}
	return sandbox.Node{}, s.nodes.changed(string(id))
}

// Nodes returns all nodes in order of id.
func (s *Store) Nodes(ctx context.Context) ([]sandbox.Node, error) {
	records, _, err := s.nodes.list(ctx)
	return values(records), err
}

// DeleteNode deletes a node's record, or answers ErrNotFound.
func (s *Store) DeleteNode(ctx context.Context, id sandbox.NodeID) error {
	_, err := s.nodes.remove(ctx, string(id))
	return err
}

// WatchNodes feeds w until ctx ends.
func (s *Store) WatchNodes(ctx context.Context, w Watcher[sandbox.Node]) error {
	return s.nodes.watch(ctx, w)
}

func values[T any](records []Record[T]) []T {
	out := make([]T, 0, len(records))
	for _, r := range records {
		out = append(out, r.Value)
	}
	return out
}

// sortedByTime returns the records' values, the oldest first, then in order of name.
func sortedByTime[T any](records []Record[T], at func(T) time.Time) []T {
	slices.SortFunc(records, func(a, b Record[T]) int {
		return cmp.Or(at(a.Value).Compare(at(b.Value)), cmp.Compare(a.Name, b.Name))
	})
	return values(records)
}
