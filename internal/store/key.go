package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Key is an API key as the cluster keeps it: never the secret, only what recognises it.
type Key struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Hash is the lower-case hex SHA-256 of the secret.
	Hash string `json:"hash"`
	// Hint is the secret's first and last characters, for people.
	Hint      string    `json:"hint"`
	CreatedAt time.Time `json:"created_at"`
	// Admin keys may manage keys, nodes and templates.
	Admin bool `json:"admin"`
	// LastUsedAt is kept apart, see NoteKeyUse; zero for a key that was never used. Only Keys fills it in.
	LastUsedAt time.Time `json:"-"`
}

// guard is written by each revocation of an admin key, so that two of them cannot both see "another one is left".
type guard struct {
	RevokedID string `json:"revoked_id"`
}

const (
	adminGuard  = "admin-keys"
	maxKeyName  = 128
	keyIDBytes  = 8
	keyIDPrefix = "key"
)

// CreateKey stores a key and returns it; an empty ID and a zero CreatedAt are filled in.
// Errors: ErrInvalid without a hash or with a name over 128 characters, ErrConflict when the ID is taken.
func (s *Store) CreateKey(ctx context.Context, k Key) (Key, error) {
	if err := completeKey(&k); err != nil {
		return Key{}, err
	}
	rev, err := s.keys.create(ctx, k.ID, k)
	if err != nil {
		return Key{}, err
	}
	s.cache.put(Record[Key]{Name: k.ID, Value: k, Revision: rev})
	return k, nil
}

// CreateFirstKey stores a key only where none exists at all, and reports whether it did.
func (s *Store) CreateFirstKey(ctx context.Context, k Key) (Key, bool, error) {
	if err := completeKey(&k); err != nil {
		return Key{}, false, err
	}
	text, err := s.keys.encode(k)
	if err != nil {
		return Key{}, false, err
	}
	none := clientv3.Compare(clientv3.CreateRevision(s.keys.prefix), "=", 0).WithPrefix()
	ok, rev, err := commit(ctx, s.client, []clientv3.Cmp{none}, []clientv3.Op{clientv3.OpPut(s.keys.key(k.ID), text)})
	if err != nil {
		return Key{}, false, fmt.Errorf("create first key: %w", err)
	}
	if !ok {
		return Key{}, false, nil
	}
	s.cache.put(Record[Key]{Name: k.ID, Value: k, Revision: rev})
	return k, true, nil
}

func completeKey(k *Key) error {
	if k.Hash == "" {
		return sandbox.Invalidf("key %q has no hash", k.Name)
	}
	if len(k.Name) > maxKeyName {
		return sandbox.Invalidf("key name of %d bytes: want at most %d", len(k.Name), maxKeyName)
	}
	if k.ID == "" {
		var raw [keyIDBytes]byte
		_, _ = rand.Read(raw[:]) // never fails: crypto/rand ends the program first
		k.ID = keyIDPrefix + hex.EncodeToString(raw[:])
	}
	if k.CreatedAt.IsZero() {
		k.CreatedAt = time.Now().UTC()
	}
	return checkName("key id", k.ID)
}

// Keys returns all keys, the oldest first.
func (s *Store) Keys(ctx context.Context) ([]Key, error) {
	records, _, err := s.keys.list(ctx)
	if err != nil {
		return nil, err
	}
	used, err := s.lastUses(ctx)
	if err != nil {
		return nil, err
	}
	for i := range records {
		records[i].Value.LastUsedAt = used[records[i].Name]
	}
	return sortedByTime(records, func(k Key) time.Time { return k.CreatedAt }), nil
}

// KeyByHash returns the key with the hash, or ErrNotFound. It reads memory only and is meant for every request.
func (s *Store) KeyByHash(hash string) (Key, error) {
	if k, ok := s.cache.lookup(hash); ok {
		return k, nil
	}
	return Key{}, sandbox.NotFoundf("no such key")
}

// RevokeKey deletes a key; it stops working on this server at once.
// Errors: ErrNotFound, and ErrConflict for the last admin key.
func (s *Store) RevokeKey(ctx context.Context, id string) error {
	for range maxRetries {
		rev, done, err := s.tryRevoke(ctx, id)
		if err != nil {
			return err
		}
		if done {
			s.cache.remove(id, rev)
			return nil
		}
	}
	return s.keys.changed(id)
}

// tryRevoke reads, decides and writes once; done is false where someone changed what it had read.
func (s *Store) tryRevoke(ctx context.Context, id string) (rev int64, done bool, err error) {
	// The guard is read before the keys: a revocation between the two reads changes it, and the write below refuses.
	guardRev, err := s.guardRevision(ctx)
	if err != nil {
		return 0, false, err
	}
	records, _, err := s.keys.list(ctx)
	if err != nil {
		return 0, false, err
	}
	target, err := decideRevoke(records, id)
	if err != nil {
		return 0, false, err
	}
	when := []clientv3.Cmp{unchanged(s.keys.key(id), target.Revision)}
	then := []clientv3.Op{clientv3.OpDelete(s.keys.key(id)), clientv3.OpDelete(s.keyUse.key(id))}
	if target.Value.Admin {
		text, err := s.guards.encode(guard{RevokedID: id})
		if err != nil {
			return 0, false, err
		}
		when = append(when, unchanged(s.guards.key(adminGuard), guardRev))
		then = append(then, clientv3.OpPut(s.guards.key(adminGuard), text))
	}
	done, rev, err = commit(ctx, s.client, when, then)
	if err != nil {
		return 0, false, fmt.Errorf("revoke key %q: %w", id, err)
	}
	return rev, done, nil
}

func (s *Store) guardRevision(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Get(ctx, s.guards.key(adminGuard))
	if err != nil {
		return 0, fmt.Errorf("read key guard: %w", explain(err))
	}
	if len(resp.Kvs) == 0 {
		return 0, nil
	}
	return resp.Kvs[0].GetModRevision(), nil
}

// decideRevoke returns the record to delete, or why it must stay.
func decideRevoke(records []Record[Key], id string) (Record[Key], error) {
	var target Record[Key]
	admins := 0
	for _, r := range records {
		if r.Value.Admin {
			admins++
		}
		if r.Name == id {
			target = r
		}
	}
	switch {
	case target.Name == "":
		return target, sandbox.NotFoundf("key %q does not exist", id)
	case target.Value.Admin && admins == 1:
		return target, sandbox.Conflictf("key %q is the last admin key: create another admin key before revoking it", id)
	}
	return target, nil
}

// loadKeys fills the cache, so that keys work before Run.
func (s *Store) loadKeys(ctx context.Context) error {
	records, rev, err := s.keys.list(ctx)
	if err != nil {
		return err
	}
	s.cache.reset(records, rev)
	return nil
}
