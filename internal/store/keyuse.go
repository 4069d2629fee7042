package store

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// keyUseEvery is how often the uses of keys are written: a key's last use is known that exactly after a crash.
const keyUseEvery = time.Minute

// keyUse is when a key was last used. It is a record of its own, so that writing it never races with a revocation.
type keyUse struct {
	At time.Time `json:"at"`
}

// keyUses holds the uses that are not written yet.
type keyUses struct {
	mu sync.Mutex
	at map[string]time.Time
}

// NoteKeyUse remembers that a key was used now. It writes memory only and is meant for every request; Run writes the
// store once a minute and when it ends.
func (s *Store) NoteKeyUse(id string) {
	s.uses.mu.Lock()
	defer s.uses.mu.Unlock()
	s.uses.at[id] = time.Now().UTC()
}

// take returns the uses that are not written yet, and forgets them.
func (u *keyUses) take() map[string]time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := u.at
	u.at = make(map[string]time.Time)
	return out
}

// giveBack takes uses back that could not be written, unless newer ones are known.
func (u *keyUses) giveBack(id string, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, newer := u.at[id]; !newer {
		u.at[id] = at
	}
}

func (u *keyUses) pending() map[string]time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return maps.Clone(u.at)
}

// writeUses writes the uses of keys until ctx ends, and then what is left.
func (s *Store) writeUses(ctx context.Context) error {
	tick := time.NewTicker(keyUseEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.flushUses(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
			defer cancel()
			s.flushUses(last)
			return ctx.Err()
		}
	}
}

// flushUses writes each use if its key still exists. What the store does not take now is tried again later.
func (s *Store) flushUses(ctx context.Context) {
	for id, at := range s.uses.take() {
		text, err := s.keyUse.encode(keyUse{At: at})
		if err == nil {
			exists := clientv3.Compare(clientv3.CreateRevision(s.keys.key(id)), ">", 0)
			_, _, err = commit(ctx, s.client, []clientv3.Cmp{exists}, []clientv3.Op{clientv3.OpPut(s.keyUse.key(id), text)})
		}
		if err != nil {
			s.uses.giveBack(id, at)
			s.log.LogAttrs(ctx, slog.LevelWarn, "last use of a key not written", slog.String("key_id", id), slog.Any("err", err))
			return
		}
	}
}

// lastUses returns when each key was last used; a key that never was is absent.
func (s *Store) lastUses(ctx context.Context) (map[string]time.Time, error) {
	records, _, err := s.keyUse.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list uses of keys: %w", err)
	}
	out := make(map[string]time.Time, len(records))
	for _, r := range records {
		out[r.Name] = r.Value.At
	}
	maps.Copy(out, s.uses.pending())
	return out, nil
}
