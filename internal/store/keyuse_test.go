package store

import (
	"context"
	"testing"
	"time"
)

// TestKeyUses follows the last use of a key: at once in memory, in the store after Run, and gone with the key.
func TestKeyUses(t *testing.T) {
	s := fresh(t)
	used, err := s.CreateKey(t.Context(), Key{Name: "used", Hash: "h1"})
	if err != nil {
		t.Fatal(err)
	}
	idle, err := s.CreateKey(t.Context(), Key{Name: "idle", Hash: "h2"})
	if err != nil {
		t.Fatal(err)
	}
	s.NoteKeyUse(used.ID)
	if at := lastUse(t, s, used.ID); at.IsZero() || time.Since(at) > time.Hour {
		t.Errorf("last use before it is written: %v", at)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if left := s.uses.pending(); len(left) != 0 {
		t.Errorf("not written when Run ended: %v", left)
	}
	if at := lastUse(t, s, used.ID); at.IsZero() {
		t.Error("the last use was not kept")
	}
	if at := lastUse(t, s, idle.ID); !at.IsZero() {
		t.Errorf("a key that nobody used was used at %v", at)
	}
	s.NoteKeyUse(used.ID)
	if err := s.RevokeKey(t.Context(), used.ID); err != nil {
		t.Fatal(err)
	}
	s.flushUses(t.Context())
	if left, _, err := s.keyUse.list(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("uses left after the key is gone: %v, %v", left, err)
	}
}

func lastUse(t *testing.T, s *Store, id string) time.Time {
	t.Helper()
	all, err := s.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range all {
		if k.ID == id {
			return k.LastUsedAt
		}
	}
	return time.Time{}
}
