package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// reflinkDisk mounts a file system that shares blocks between files.
func reflinkDisk(t *testing.T) string {
	t.Helper()
	requireHosts(t)
	dir := t.TempDir()
	disk, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	closeTest(t, f)
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1", disk}, {"mount", "-o", "loop", disk, mnt}} {
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return mnt
}

// TestComposeSharesBlocks composes an image where the file system lets it share its base's files.
func TestComposeSharesBlocks(t *testing.T) {
	s := newStore(t, func(c *Config) { c.Dir = filepath.Join(reflinkDisk(t), "store") })
	root := t.TempDir()
	const size = 32 << 20
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(i/4096) + 1
	}
	if err := os.WriteFile(filepath.Join(root, "large"), body, 0o600); err != nil {
		t.Fatal(err)
	}
	under, err := s.Build(t.Context(), Request{Sources: []string{"dir:" + root}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := s.NewRecorder()
	defer closeTest(t, r)
	layer := record(t, r, "app/main.py", "print()")
	before := usedBytes(t, s.cfg.Dir)
	img, err := s.Compose(t.Context(), under.Digest, []string{layer}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if grown := usedBytes(t, s.cfg.Dir) - before; img.Bytes < size || grown > size/8 {
		t.Errorf("an image of %d bytes takes %d more", img.Bytes, grown)
	}
	if err := s.Verify(t.Context(), img.Digest); err != nil {
		t.Error(err)
	}
}

// usedBytes is what a file system holds.
func usedBytes(tb testing.TB, dir string) int64 {
	tb.Helper()
	f, err := os.Open(dir)
	if err != nil {
		tb.Fatal(err)
	}
	var st unix.Statfs_t
	if err := errors.Join(unix.Syncfs(int(f.Fd())), unix.Fstatfs(int(f.Fd()), &st), f.Close()); err != nil {
		tb.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}
