package daemon

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestChooseStorage(t *testing.T) {
	for _, tc := range []struct {
		name, setting string
		has           found
		image         bool
		err           error
	}{
		{"new, nothing said", config.StorageAuto, found{}, false, nil},
		{"new, image", config.StorageImage, found{}, true, nil},
		{"new, dir", config.StorageDir, found{}, false, nil},
		{"plain, nothing said", config.StorageAuto, found{plain: true}, false, nil},
		{"plain, image", config.StorageImage, found{plain: true}, false, sandbox.ErrConflict},
		{"image, nothing said", config.StorageAuto, found{image: true}, true, nil},
		{"image, mounted", config.StorageImage, found{image: true, mounted: true}, true, nil},
		{"image, dir", config.StorageDir, found{image: true}, false, sandbox.ErrConflict},
		{"both", config.StorageAuto, found{image: true, plain: true}, false, sandbox.ErrConflict},
	} {
		t.Run(tc.name, func(t *testing.T) {
			image, err := chooseStorage(tc.setting, "/data", tc.has)
			if image != tc.image || !errors.Is(err, tc.err) {
				t.Errorf("got %v, %v; want %v, %v", image, err, tc.image, tc.err)
			}
		})
	}
}

// testStorage returns a storage of its own in a new data directory on a disk.
func testStorage(t *testing.T, size int64) storage {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the switch of the tests themselves
			t.Fatal("this test needs root")
		}
		t.Skip("this test needs root")
	}
	dir, err := os.MkdirTemp("/var/tmp", "cloister-storage-") //nolint:usetesting // on a disk: /tmp may be memory
	if err != nil {
		t.Fatal(err)
	}
	s, err := storageOf(&config.Config{DataDir: dir, StorageSize: config.Size(size)}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(s.node, unix.MNT_DETACH)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return s
}

func use(t *testing.T, s storage) {
	t.Helper()
	if err := s.create(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.open(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// clone makes a file and a clone of it in the node's directory.
func clone(t *testing.T, s storage) {
	t.Helper()
	from, err := os.Create(filepath.Join(s.node, "from"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = from.Close() }()
	to, err := os.Create(filepath.Join(s.node, "to"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = to.Close() }()
	if _, err := from.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd())); err != nil {
		t.Errorf("clone a file: %v", err)
	}
}

// blocks returns how much of a file is really on the disk, in bytes.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestStorageImage goes through an image's life: made, found again, mounted again as after a restart of the machine, grown, gone.
func TestStorageImage(t *testing.T) {
	s := testStorage(t, 600<<20)
	use(t, s)
	clone(t, s)
	if used := blocks(t, s.image); used > 200<<20 {
		t.Errorf("a new image takes %d MiB of the disk: it is not sparse", used>>20)
	}
	dev, err := attached(s.image)
	if err != nil || dev == nil {
		t.Fatalf("loop device: %v, %v", dev, err)
	}
	name := filepath.Base(dev.Name())
	if err := dev.Close(); err != nil {
		t.Error(err)
	}

	for range 2 { // what is mounted stays so, what is not is mounted
		if err := s.open(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := mounts(t, s.node); n != 1 {
			t.Errorf("mounted %d times, want once", n)
		}
		if _, err := os.Stat(filepath.Join(s.node, "to")); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(s.node, 0); err != nil {
			t.Fatal(err)
		}
	}

	before := int64(600 << 20)
	for _, mounted := range []bool{false, true} {
		if is, err := s.mounted(); err != nil || is != mounted {
			t.Errorf("mounted: %v, %v; want %v", is, err, mounted)
		}
		s.size = before + 200<<20
		if err := s.open(t.Context()); err != nil {
			t.Fatal(err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(s.node, &st); err != nil {
			t.Fatal(err)
		}
		if total := int64(st.Blocks) * st.Bsize; total < before {
			t.Errorf("the file system has %d MiB after it grew to %d MiB", total>>20, s.size>>20)
		}
		before = s.size
	}
	s.size = 600 << 20
	if err := s.open(t.Context()); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("shrink: %v; want ErrInvalid", err)
	}
	s.size = 1 << 60
	if err := s.open(t.Context()); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("grow beyond the disk: %v; want ErrExhausted", err)
	}

	if err := s.purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.image); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the image: %v; want it gone", err)
	}
	if n := mounts(t, s.node); n != 0 {
		t.Errorf("still mounted %d times", n)
	}
	if back, err := os.ReadFile("/sys/block/" + name + "/loop/backing_file"); err == nil {
		t.Errorf("%s is still attached to %s", name, back)
	}
}

// mounts counts the mounts at a directory.
func mounts(t *testing.T, dir string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(text), " "+dir+" ")
}

// TestStorageGivesBack deletes a file: the disk below gets its space back.
func TestStorageGivesBack(t *testing.T) {
	s := testStorage(t, 1<<30)
	use(t, s)
	name := filepath.Join(s.node, "big")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(make([]byte, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	full := blocks(t, s.image)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := s.close(t.Context()); err != nil { // ends what is under way
		t.Fatal(err)
	}
	if left := full - blocks(t, s.image); left < 60<<20 {
		t.Errorf("deleting 64 MiB gave %d MiB back", left>>20)
	}
}

// TestStorageFailsWhole breaks the making of an image at each of its steps.
func TestStorageFailsWhole(t *testing.T) {
	t.Run("no mkfs", func(t *testing.T) {
		s := testStorage(t, 600<<20)
		t.Setenv("PATH", t.TempDir())
		if err := s.create(t.Context()); !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("create: %v; want ErrUnsupported", err)
		}
		empty(t, filepath.Dir(s.image))
	})
	t.Run("mkfs fails", func(t *testing.T) {
		s := testStorage(t, 600<<20)
		bin := t.TempDir()
		if err := os.WriteFile(filepath.Join(bin, "mkfs.xfs"), []byte("#!/bin/sh\necho it broke >&2; exit 1\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", bin+":"+os.Getenv("PATH")) //nolint:forbidigo // the tests' own
		if err := s.create(t.Context()); err == nil {
			t.Error("create: no error")
		}
		empty(t, filepath.Dir(s.image))
	})
	t.Run("no XFS in the file", func(t *testing.T) {
		s := testStorage(t, 0)
		if err := makeSparse(s.image, 600<<20); err != nil {
			t.Fatal(err)
		}
		if err := s.open(t.Context()); err == nil {
			t.Error("open: no error")
		}
		if dev, err := attached(s.image); err != nil || dev != nil {
			t.Errorf("loop device: %v, %v; want none", dev, err)
		}
		s.openForPurge(t.Context())
		if err := errors.Join(s.purge(t.Context()), os.Remove(s.node)); err != nil {
			t.Error(err)
		}
		empty(t, filepath.Dir(s.image))
	})
}

func empty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%s: %v, %v; want it empty", dir, left, err)
	}
}

// TestStorageInAnotherNamespace mounts the image where the first mount cannot be seen: both are one file system.
func TestStorageInAnotherNamespace(t *testing.T) {
	s := testStorage(t, 600<<20)
	use(t, s)
	if err := os.WriteFile(filepath.Join(s.node, "file"), []byte("here"), 0o600); err != nil {
		t.Fatal(err)
	}
	script := `umount "$1" && exec "$2" -test.run '^TestStorageOpenOnce$' -test.v`
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-ec", script, "sh", s.node, os.Args[0])
	cmd.Env = append(os.Environ(), onceVar+"="+filepath.Dir(s.image))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if text, err := os.ReadFile(filepath.Join(s.node, "file")); err != nil || string(text) != "from there" {
		t.Errorf("the file: %q, %v", text, err)
	}
}

// onceVar names the data directory for TestStorageOpenOnce, which is the other half of a test.
const onceVar = "CLOISTER_TEST_STORAGE"

func TestStorageOpenOnce(t *testing.T) {
	dir := os.Getenv(onceVar) //nolint:forbidigo // the tests' own
	if dir == "" {
		return
	}
	s, err := storageOf(&config.Config{DataDir: dir}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.node, "file"), []byte("from there"), 0o600); err != nil {
		t.Fatal(err)
	}
}
