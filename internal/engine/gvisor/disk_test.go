package gvisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// sharingDisk mounts a new file system with reflinks, of so many bytes, and returns where.
func sharingDisk(tb testing.TB, size int64) string {
	tb.Helper()
	needHost(tb)
	base, err := os.MkdirTemp("/var/tmp", "gvdisk") //nolint:usetesting // its end has to be after the guests'
	if err != nil {
		tb.Fatal(err)
	}
	image, dir := filepath.Join(base, "image"), filepath.Join(base, "mnt")
	tb.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			tb.Error(err)
		}
	})
	f, err := os.Create(image)
	if err != nil {
		tb.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		tb.Fatal(err)
	}
	if err := f.Close(); err != nil {
		tb.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	command(tb, "mkfs.xfs", "-q", "-m", "reflink=1", image)
	command(tb, "mount", "-o", "loop", image, dir)
	tb.Cleanup(func() { command(tb, "umount", dir) })
	return dir
}

func command(tb testing.TB, name string, args ...string) {
	tb.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		tb.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}
