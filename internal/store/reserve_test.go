package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// smallDisk mounts a disk of its own for a test.
func smallDisk(tb testing.TB, size string) string {
	tb.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the switch of the tests themselves
			tb.Fatal("this test needs root")
		}
		tb.Skip("this test needs root")
	}
	dir := tb.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			tb.Error(err)
		}
	})
	return dir
}

// fill leaves no byte of the disk of dir free.
func fill(tb testing.TB, dir string) {
	tb.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		tb.Fatal(err)
	}
}

// TestFullDisk writes on, ends and starts again on a disk without a free byte.
func TestFullDisk(t *testing.T) {
	disk := smallDisk(t, "160m")
	dir := filepath.Join(disk, "store")
	s := open(t, dir)
	if err := takeSpare(dir); err != nil {
		t.Fatal(err)
	}
	fill(t, disk)
	made := 0
	for range 3 {
		for range 20 {
			n := sandbox.Node{ID: sandbox.NodeID(fmt.Sprintf("n%05d", made)), Name: strings.Repeat("x", 32<<10)}
			if err := s.PutNode(t.Context(), n); err != nil {
				t.Fatalf("after %d nodes: %v", made, err)
			}
			made++
		}
		s.etcd.Server.Backend().ForceCommit()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, dir)
	}
	all, err := s.Nodes(t.Context())
	if err != nil || len(all) != made {
		t.Errorf("%d nodes, %v; want %d", len(all), err, made)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestDamagedLog starts on a log that is none: an error with a remedy, no wait for ever.
func TestDamagedLog(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "member", "wal", "*.wal"))
	if err != nil || len(logs) == 0 {
		t.Fatal(logs, err)
	}
	if err := os.WriteFile(logs[0], []byte(strings.Repeat("garbage!", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*startTimeout)
	defer cancel()
	// In a process of its own: etcd leaves goroutines behind when it panics.
	out, err := exec.CommandContext(ctx, os.Args[0], childArg, dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "down --purge") {
		t.Errorf("start on a damaged log: %v, %s; want an error with a remedy", err, out)
	}
}
