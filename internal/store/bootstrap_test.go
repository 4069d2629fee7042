package store

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// TestUnfinishedFirstStart opens a store whose first start was cut off: its log has a head and no records.
func TestUnfinishedFirstStart(t *testing.T) {
	dir := t.TempDir()
	wal := filepath.Join(dir, "member", "wal")
	if err := errors.Join(os.MkdirAll(wal, 0o700), os.MkdirAll(filepath.Join(dir, "member", "snap"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(wal, "0000000000000000-0000000000000000.wal"), make([]byte, 80), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	made, err := s.CreateKey(t.Context(), Key{Name: "k", Hash: "h"})
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, unfinishedName)); err != nil {
		t.Errorf("what was put away: %v", err)
	}
	s = open(t, dir) // what was finished stays
	if _, err := s.KeyByHash("h"); err != nil {
		t.Errorf("key %s after another start: %v", made.ID, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUnfinishedIsNotLost leaves a finished store alone, and keeps what was not finished until the next time.
func TestUnfinishedIsNotLost(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	if err := beginAnew(dir, log); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "member"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(noteBooted(dir), beginAnew(dir, log)); err != nil {
		t.Fatal(err)
	}
	if isNew(dir) {
		t.Error("a finished store was put away")
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, bootedName)), beginAnew(dir, log)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, unfinishedName)); !isNew(dir) || err != nil {
		t.Errorf("an unfinished store: new %t, put away %v", isNew(dir), err)
	}
	if noteBooted(filepath.Join(dir, "nowhere")) == nil {
		t.Error("a directory that is not there was noted")
	}
}
