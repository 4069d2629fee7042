package daemon

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestLockNamesItsHolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	held, err := acquire(t.Context(), dir, "v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := held.nameNode("abc123"); err != nil {
		t.Fatal(err)
	}
	h, ok := HolderOf(dir)
	if !ok || h.PID != os.Getpid() || h.Version != "v1" || h.Node != "abc123" {
		t.Errorf("holder %+v, held %t; want this process", h, ok)
	}
	if _, err := acquire(t.Context(), dir, "v2"); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "cloister down") {
		t.Errorf("second acquire: %v; want a conflict with the remedy", err)
	}
	held.release()
	if h, ok := HolderOf(dir); ok {
		t.Errorf("after release: held by %+v", h)
	}
	again, err := acquire(t.Context(), dir, "v2")
	if err != nil {
		t.Fatal(err)
	}
	again.release()
}

// TestLockOutlivesItsHolder has a dead process's child hold the lock for a moment, as when a daemon is killed in the middle
// of starting a sandbox.
func TestLockOutlivesItsHolder(t *testing.T) {
	dir := t.TempDir()
	dead := exec.CommandContext(t.Context(), "true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(lockPath(dir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	l := &lock{file: f, holder: Holder{PID: dead.Process.Pid}}
	if err := l.write(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(50*time.Millisecond, l.release)
	defer timer.Stop()
	held, err := acquire(context.WithoutCancel(t.Context()), dir, "v1")
	if err != nil {
		t.Fatalf("acquire while a dead holder's child lets go: %v", err)
	}
	held.release()
}
