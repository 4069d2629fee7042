package hosts_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// tiny prepares a daemon whose template is a tiny tree alone.
func tiny(t *testing.T, flags ...string) *harness.Daemon {
	t.Helper()
	d := harness.New(t, flags...)
	at := slices.Index(d.Flags, "--base-sources")
	d.Flags[at+1] = "dir:" + harness.TinyTree(t)
	return d
}

// onDisk gives a daemon's data directory a disk of its own, with nothing of it reserved for root.
func onDisk(t *testing.T, d *harness.Daemon, size string) {
	t.Helper()
	image := filepath.Join(d.Dir, "disk.img")
	must := func(name string, args ...string) {
		if out, err := exec.CommandContext(context.WithoutCancel(t.Context()), name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
	}
	if err := os.MkdirAll(d.DataDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	must("truncate", "-s", size, image)
	must("mkfs.ext4", "-q", "-F", "-m", "0", image)
	must("mount", "-o", "loop", image, d.DataDir())
	t.Cleanup(func() { // runs before the harness's own
		if out, code := d.CLI(context.WithoutCancel(t.Context()), append([]string{"down", "--purge"}, d.Flags...)...); code != 0 {
			t.Errorf("down --purge: exit code %d: %s", code, out)
		}
		must("umount", "-l", d.DataDir())
	})
}

// fillDisk leaves no byte free on the disk of dir, and returns what gives the room back.
func fillDisk(t *testing.T, dir string) (undo func()) {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size >= 512; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	_ = f.Sync() // what could be written is
	if err := f.Close(); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
}

// refused checks that an error is a 503 that says why and when to come again.
func refused(t *testing.T, err error, why string) {
	t.Helper()
	var e *client.APIError
	if !errors.As(err, &e) || e.Code != http.StatusServiceUnavailable || e.RetryAfter == 0 || !strings.Contains(e.Message, why) {
		t.Errorf("%v (%+v); want 503 with Retry-After and %q", err, e, why)
	}
}

// eventually waits until check has no objection any more.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// TestFullDisk has guests and the machine itself write until nothing goes any more. The daemon says so, starts again, ends
// sandboxes, and goes on by itself once there is room; nothing that it had acknowledged is lost.
func TestFullDisk(t *testing.T) {
	d := tiny(t, "--reserved-disk", "16MiB", "--sandbox-disk", "384MiB", "--pool-min", "0", "--pool-max", "0")
	onDisk(t, d, "800M")
	d.Up()
	kept, big := create(t, d), create(t, d)
	run(t, d, kept.ID, "echo precious > a; sync")
	if out, code := d.CLI(t.Context(), "sandbox", "exec", big.ID, "head -c 2000000000 /dev/zero > big"); code == 0 {
		t.Errorf("a guest wrote beyond its disk: %s", out)
	}
	undo := fillDisk(t, d.DataDir())
	c := d.Client()
	full := func() {
		t.Helper()
		for range 3 {
			_, err := c.CreateSandbox(t.Context(), client.CreateSandbox{})
			refused(t, err, "disk")
		}
		if got := run(t, d, kept.ID, "cat a"); got != "precious" {
			t.Errorf("read back %q", got)
		}
		if _, err := c.CreateKey(t.Context(), "made on a full disk"); err != nil {
			t.Error(err)
		}
	}
	full()
	d.Signal(syscall.SIGKILL)
	d.Up()
	full()
	if err := c.KillSandbox(t.Context(), big.ID); err != nil {
		t.Errorf("kill: %v", err)
	}
	undo()
	eventually(t, 30*time.Second, func() error {
		_, err := c.CreateSandbox(t.Context(), client.CreateSandbox{})
		return err
	})
	keys, err := c.Keys(t.Context())
	if err != nil || len(keys) != 3 {
		t.Errorf("%d keys, %v; want the admin's and two more", len(keys), err)
	}
	eventually(t, 10*time.Second, func() error {
		events, err := c.Events(t.Context(), client.ListEvents{SandboxID: big.ID, Type: "killed", Limit: 10})
		if err == nil && len(events) != 1 {
			err = errors.New("the end of a sandbox is not in the history")
		}
		return err
	})
}

// TestBeyondCapacity asks for far more sandboxes than may be: each answer comes soon. Then clients leave in the middle.
func TestBeyondCapacity(t *testing.T) {
	d := tiny(t, "--max-sandboxes", "6", "--pool-min", "1", "--pool-max", "2")
	d.Up()
	c := d.Client()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var made atomic.Int32
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(func() {
			if _, err := c.CreateSandbox(ctx, client.CreateSandbox{}); err == nil {
				made.Add(1)
			} else {
				refused(t, err, "no")
			}
		})
	}
	wg.Wait()
	if made.Load() == 0 || made.Load() > 6 {
		t.Errorf("%d sandboxes were made, want 1 to 6", made.Load())
	}
	if out, code := d.CLI(t.Context(), "sandbox", "kill", "--all"); code != 0 {
		t.Errorf("kill --all: exit code %d: %s", code, out)
	}
	made.Store(0)
	for i := range 60 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(5*i)*time.Millisecond)
			defer cancel()
			if _, err := c.CreateSandbox(ctx, client.CreateSandbox{}); err == nil {
				made.Add(1)
			}
		})
	}
	wg.Wait()
	eventually(t, 10*time.Second, func() error {
		s, _, err := c.Sandboxes(t.Context(), client.ListSandboxes{States: []string{"running"}, Limit: 100})
		if n := len(sentries(t, d.DataDir(), "")); err == nil && n > len(s)+2 {
			err = errors.New("more processes than sandboxes and warm ones")
		}
		return err
	})
}

// TestLostSandboxExplained kills a sandbox's process under an open stream.
func TestLostSandboxExplained(t *testing.T) {
	d := tiny(t, "--pool-min", "0", "--pool-max", "0")
	d.Up()
	s, other := create(t, d), create(t, d)
	cmd := exec.CommandContext(t.Context(), harness.Binary(t), "--data-dir", d.DataDir(), "sandbox", "exec", s.ID, "echo begun; sleep 600")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var says strings.Builder
	cmd.Stderr = &says
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("begun"))); err != nil {
		t.Fatal(err)
	}
	for _, pid := range sentries(t, d.DataDir(), s.ID) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	if err := cmd.Wait(); err == nil || !timer.Stop() {
		t.Errorf("the command of a dead sandbox: %v; want it to fail at once", err)
	}
	eventually(t, 5*time.Second, func() error {
		got, err := d.Client().GetSandbox(t.Context(), s.ID)
		if err == nil && (got.State != "failed" || !strings.Contains(got.Reason, "killed")) {
			err = errors.New("state " + got.State + ", reason " + got.Reason)
		}
		return err
	})
	run(t, d, other.ID, "cat /dev/null")
}

// TestLostFiles takes files of the data directory away, or damages them, while the daemon is dead.
func TestLostFiles(t *testing.T) {
	d := tiny(t, "--pool-min", "1", "--pool-max", "2")
	d.Up()
	create(t, d)
	node := nodeOf(t, d)
	journal := filepath.Join(d.DataDir(), "node", "journal.db")
	lose := func() {
		t.Helper()
		for _, name := range []string{journal, journal + "-wal"} {
			if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}

	d.Signal(syscall.SIGKILL)
	lose()
	for _, name := range []string{"server/history.db", "admin.key"} {
		if err := os.WriteFile(filepath.Join(d.DataDir(), name), []byte(d.Key+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.Up()
	if got := nodeOf(t, d); got != node {
		t.Errorf("the node came back as %s, it was %s", got, node)
	}
	create(t, d)

	d.Signal(syscall.SIGKILL)
	lose()
	if err := os.WriteFile(journal, []byte(strings.Repeat("garbage ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), harness.Binary(t), append([]string{"up"}, d.Flags...)...)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "damaged") || !strings.Contains(string(out), "down --purge") {
		t.Errorf("up on a damaged journal: %v: %s; want an error with a remedy", err, out)
	}
	for range 2 { // the second finds nothing, which is no mistake
		if out, code := d.CLI(t.Context(), append([]string{"down", "--purge"}, d.Flags...)...); code != 0 {
			t.Errorf("down --purge: exit code %d: %s", code, out)
		}
	}
	if left := traces(t, d, node); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestKilledWhileBuilding kills the first start at several moments. The next one goes on.
func TestKilledWhileBuilding(t *testing.T) {
	d := tiny(t, "--pool-min", "0", "--pool-max", "0")
	for i := range 6 {
		cmd := exec.CommandContext(t.Context(), harness.Binary(t), append([]string{"up"}, d.Flags...)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pause(t.Context(), time.Duration(50+60*i)*time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
	}
	d.Up()
	create(t, d)
	if left, err := os.ReadDir(filepath.Join(d.DataDir(), "node", "images", "tmp")); err != nil || len(left) > 0 {
		t.Errorf("half-made images: %v, %v", left, err)
	}
}
