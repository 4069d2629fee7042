package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Presence is a record that is there for as long as its owner is.
type Presence struct {
	Role sandbox.Role `json:"role"`
	ID   string       `json:"id"`
	Name string       `json:"name"`
	// Address is the HOST:PORT on which it answers; empty where it cannot be dialed.
	Address string    `json:"address,omitempty"`
	Version string    `json:"version"`
	Since   time.Time `json:"since"`
	// Epoch is that of a node's registration; 0 for others.
	Epoch int64 `json:"epoch,omitempty"`
}

// LeastTTL is the shortest life of a lease: etcd counts in seconds.
const LeastTTL = time.Second

func (s *Store) presences() collection[Presence] {
	return newCollection[Presence](s.client, "presences", "presence")
}

// Attend keeps p there until ctx ends, and returns ctx's error. Then, as where the process dies, the record is gone within
// ttl, of 1 s or more, unless somebody attends as the same member meanwhile; RemovePresence takes it away at once. A record
// that expired although its owner lives, because the store was away for longer, is made again. Of two that attend as the same
// member the later one has the record.
func (s *Store) Attend(ctx context.Context, p Presence, ttl time.Duration) error {
	m := sandbox.Member{Role: p.Role, ID: p.ID}
	if err := sandbox.CheckMember(m); err != nil {
		return err
	}
	if ttl < LeastTTL {
		return sandbox.Invalidf("presence of %s for %s: want %s or more", m, ttl, LeastTTL)
	}
	t := tenant[Presence]{all: s.presences(), name: m.String(), value: p, ttl: ttl, log: s.log}
	return t.run(ctx)
}

// RemovePresence takes a member's record away. One that is not there is no error. Who attends as the member ends that first.
func (s *Store) RemovePresence(ctx context.Context, m sandbox.Member) error {
	if err := sandbox.CheckMember(m); err != nil {
		return err
	}
	if _, err := s.presences().remove(ctx, m.String()); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	return nil
}

// Presences returns who is there, by role and id.
func (s *Store) Presences(ctx context.Context) ([]Presence, error) {
	records, _, err := s.presences().list(ctx)
	return values(records), err
}

// WatchPresences feeds w until ctx ends.
func (s *Store) WatchPresences(ctx context.Context, w Watcher[Presence]) error {
	return s.presences().watch(ctx, w)
}

// tenant keeps one record under a lease of its own.
type tenant[T any] struct {
	all   collection[T]
	name  string
	value T
	ttl   time.Duration
	log   *slog.Logger
}

// run holds the record until ctx ends, and returns ctx's error, or ErrUnavailable once the store is closed.
func (t *tenant[T]) run(ctx context.Context) error {
	for {
		lease, err := t.take(ctx)
		if err == nil {
			err = t.keep(ctx, lease)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case t.all.client.Ctx().Err() != nil:
			return sandbox.Unavailablef("hold %s %q: the store is closed", t.all.kind, t.name)
		}
		t.log.LogAttrs(ctx, slog.LevelWarn, "a leased record is made again", slog.String("kind", t.all.kind), slog.String("name", t.name), slog.Any("err", err))
		select {
		case <-time.After(retryDelay):
		case <-ctx.Done():
		case <-t.all.client.Ctx().Done():
		}
	}
}

// take makes a lease and writes the record under it. On an error the lease, if there is one, ends by itself.
func (t *tenant[T]) take(ctx context.Context) (clientv3.LeaseID, error) {
	text, err := t.all.encode(t.value)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	lease, err := t.all.client.Grant(ctx, seconds(t.ttl))
	if err != nil {
		return 0, fmt.Errorf("lease of %s %q: %w", t.all.kind, t.name, explain(err))
	}
	put := clientv3.OpPut(t.all.key(t.name), text, clientv3.WithLease(lease.ID))
	if _, _, err := commit(ctx, t.all.client, nil, []clientv3.Op{put}); err != nil {
		return 0, fmt.Errorf("put %s %q: %w", t.all.kind, t.name, err)
	}
	return lease.ID, nil
}

// keep renews the lease three times in its life, until it is lost.
func (t *tenant[T]) keep(ctx context.Context, lease clientv3.LeaseID) error {
	tick := time.NewTicker(t.ttl / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if err := t.renew(ctx, lease); errors.Is(err, rpctypes.ErrLeaseNotFound) || t.all.client.Ctx().Err() != nil {
			return err
		} // all else is tried again: until the lease has ended, it may be good
	}
}

func (t *tenant[T]) renew(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	_, err := t.all.client.KeepAliveOnce(ctx, lease)
	return err
}

// seconds rounds a lease's life up.
func seconds(ttl time.Duration) int64 { return int64((ttl + time.Second - 1) / time.Second) }
