package history

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDamaged opens a file that is no database: it is put aside, and a new history begins.
func TestDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	garbage := strings.Repeat("garbage ", 2000)
	if err := os.WriteFile(path, []byte(garbage), 0o600); err != nil {
		t.Fatal(err)
	}
	h := open(t, Config{Path: path})
	start(t, h)
	if err := h.Append(t.Context(), []Event{{Type: "created"}}); err != nil {
		t.Fatal(err)
	}
	if got, err := h.Query(t.Context(), Query{}); err != nil || len(got) != 1 {
		t.Errorf("events: %v, %v; want the one", got, err)
	}
	aside, err := filepath.Glob(path + ".damaged-*")
	if err != nil || len(aside) == 0 {
		t.Fatalf("put aside: %v, %v", aside, err)
	}
	if text, err := os.ReadFile(aside[0]); err != nil || string(text) != garbage {
		t.Errorf("what was put aside has %d bytes, %v; want it as it was", len(text), err)
	}
}

// TestReserve has the log own room on the disk, also after it was closed and opened again.
func TestReserve(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	for range 2 {
		h := open(t, Config{Path: path})
		if err := h.write.Close(); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path + "-wal"); err != nil || info.Size() < reserveBytes {
			t.Errorf("log: %v, %v; want %d bytes or more", info, err, reserveBytes)
		}
	}
}
