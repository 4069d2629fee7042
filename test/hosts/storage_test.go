package hosts_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// ofImage returns the mounts and loop devices of a daemon's storage image.
func ofImage(t *testing.T, d *harness.Daemon) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Split(string(text), "\n")
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range backing {
		if text, err := os.ReadFile(name); err == nil {
			all = append(all, name+" "+string(text))
		}
	}
	return slices.DeleteFunc(all, func(s string) bool { return !strings.Contains(s, d.DataDir()) })
}

// TestStorageImage runs sandboxes on an image: they go on over restarts, a start after a restart of the machine mounts it again,
// and nothing of it is left by a purge.
func TestStorageImage(t *testing.T) {
	d := tiny(t, "--storage", "image", "--storage-size", "2GiB", "--reserved-disk", "16MiB", "--sandbox-disk", "256MiB", "--pool-max", "2", "--pool-min", "1")
	d.Up()
	if got := ofImage(t, d); len(got) != 2 {
		t.Fatalf("mounts and loop devices: %q; want one of each", got)
	}
	kept := create(t, d)
	run(t, d, kept.ID, "echo precious > a; sync")
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		d.Signal(sig)
		if sig == syscall.SIGKILL { // the image is used without being asked for again
			d.Flags = slices.DeleteFunc(d.Flags, func(s string) bool { return s == "--storage" || s == "image" || s == "--storage-size" || s == "2GiB" })
		}
		d.Up()
		if got := ofImage(t, d); len(got) != 2 {
			t.Errorf("mounts and loop devices after a restart: %q; want one of each", got)
		}
		if got := run(t, d, kept.ID, "cat a"); got != "precious" {
			t.Errorf("read back %q", got)
		}
	}

	d.Signal(syscall.SIGTERM)
	out, err := exec.CommandContext(t.Context(), harness.Binary(t), append([]string{"up", "--storage", "dir"}, d.Flags...)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "storage.img") {
		t.Errorf("up --storage dir on an image: %v: %s; want an error that names the image", err, out)
	}

	// What a restart of the machine leaves: the image, no process, no mount.
	for _, pid := range sentries(t, d.DataDir(), "") {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, func() error { return syscall.Unmount(filepath.Join(d.DataDir(), "node"), 0) })
	if got := ofImage(t, d); len(got) != 0 {
		t.Errorf("mounts and loop devices after the unmount: %q; want none", got)
	}
	d.Up()
	got, err := d.Client().GetSandbox(t.Context(), kept.ID)
	if err != nil || got.State != "lost" {
		t.Errorf("the sandbox of before is %s, %v; want it lost", got.State, err)
	}
	s := create(t, d)
	run(t, d, s.ID, "echo again > a; sync")
	node := nodeOf(t, d)

	d.Signal(syscall.SIGKILL)
	if out, code := d.CLI(t.Context(), append([]string{"down", "--purge"}, d.Flags...)...); code != 0 {
		t.Errorf("down --purge: exit code %d: %s", code, out)
	}
	if left := append(traces(t, d, node), ofImage(t, d)...); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if _, err := os.Stat(d.DataDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data directory: %v; want it gone", err)
	}
}

// TestStorageImageRefused keeps what a plain data directory holds.
func TestStorageImageRefused(t *testing.T) {
	d := tiny(t, "--pool-max", "0", "--pool-min", "0")
	d.Up()
	kept := create(t, d)
	d.Signal(syscall.SIGTERM)
	cmd := exec.CommandContext(t.Context(), harness.Binary(t), append([]string{"up", "--storage", "image"}, d.Flags...)...)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "plain directory") {
		t.Errorf("up --storage image on a plain directory: %v: %s; want an error that says so", err, out)
	}
	d.Up()
	run(t, d, kept.ID, "cat /dev/null")
	if got := ofImage(t, d); len(got) != 0 {
		t.Errorf("mounts and loop devices: %q; want none", got)
	}
}

// TestStorageImageKilled kills the first start while the image is made and mounted. The next one goes on.
func TestStorageImageKilled(t *testing.T) {
	d := tiny(t, "--storage", "image", "--storage-size", "1GiB", "--reserved-disk", "16MiB", "--sandbox-disk", "64MiB", "--pool-max", "0", "--pool-min", "0")
	for i := range 8 {
		cmd := exec.CommandContext(t.Context(), harness.Binary(t), append([]string{"up"}, d.Flags...)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pause(t.Context(), time.Duration(15+8*i)*time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		if got := ofImage(t, d); len(got) != 0 && len(got) != 2 {
			t.Errorf("mounts and loop devices: %q; want both or none", got)
		}
	}
	d.Up()
	if got := ofImage(t, d); len(got) != 2 {
		t.Errorf("mounts and loop devices: %q; want one of each", got)
	}
	if _, err := d.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 60}); err != nil {
		t.Error(err)
	}
}
