package image

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// smallDisk mounts a file system of that many bytes.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	requireHosts(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fillDisk leaves that many bytes of a disk.
func fillDisk(t *testing.T, dir string, left int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, int64(st.Bfree)*st.Bsize-left), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(ballast) })
}

// TestFullDisk runs out of room in the middle of everything that writes.
func TestFullDisk(t *testing.T) {
	disk := smallDisk(t, "8m")
	s := newStore(t, func(c *Config) { c.Dir = filepath.Join(disk, "store") })
	img := composed(t, s)
	want := describe(t, s, img.Digest)
	r := s.NewRecorder()
	defer closeTest(t, r)
	small := record(t, r, "small", "1")
	fillDisk(t, disk, 32<<10)

	large := tarOf(t, "small", "1", "large", strings.Repeat("x", 1<<20))
	if _, err := r.Add(t.Context(), bytes.NewReader(large)); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("Add: %v", err)
	}
	if _, err := s.Compose(t.Context(), img.Base, []string{small}, nil); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("Compose: %v", err)
	}
	assertNoLeftovers(t, s)
	to := "docker-archive:" + filepath.Join(disk, "docker.tar")
	if err := s.Push(t.Context(), pushRequest(img.Digest, to), nil); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("Push: %v", err)
	}
	assertNoLeftovers(t, s)
	if all, err := s.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("images: %v, %v", all, err)
	}
	if left, err := filepath.Glob(filepath.Join(disk, "*docker*")); err != nil || len(left) != 0 {
		t.Errorf("left of the push: %v, %v", left, err)
	}

	if err := os.Remove(filepath.Join(disk, "ballast")); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Compose(t.Context(), img.Base, img.Layers, nil); err != nil || again.Digest != img.Digest {
		t.Errorf("with room again: %v, %v", again, err)
	}
	if l, err := r.Add(t.Context(), bytes.NewReader(large)); err != nil || l.Bytes < 1<<20 {
		t.Errorf("with room again: %+v, %v", l, err)
	}
	if got := describe(t, s, img.Digest); len(got) != len(want) {
		t.Error("the image that was there is another")
	}
}

// TestKilledCompose kills a process that composes an image again and again: there is a whole image or none.
func TestKilledCompose(t *testing.T) {
	s := newStore(t, func(c *Config) { c.Guest = nil })
	img := composed(t, s)
	for round := range 12 {
		if err := s.Remove(t.Context(), img.Digest); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			t.Fatal(err)
		}
		cmd, out := startHelper(t, "-helper.dir="+s.cfg.Dir, "-helper.base="+img.Base, "-helper.layers="+strings.Join(img.Layers, ","))
		for range round%3 + 1 {
			if !out.Scan() {
				t.Fatal("the helper says nothing")
			}
		}
		kill(t, cmd)
		if err := s.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		assertNoLeftovers(t, s)
		all, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, each := range all {
			if err := s.Verify(t.Context(), each.Digest); err != nil {
				t.Error(err)
			}
		}
		again, err := s.Compose(t.Context(), img.Base, img.Layers, nil)
		if err != nil || again.Digest != img.Digest {
			t.Errorf("composed after the kill: %s, %v; want %s", again.Digest, err, img.Digest)
		}
	}
}
