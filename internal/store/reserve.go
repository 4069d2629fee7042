package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// etcd ends its process when it cannot write, and needs a new log segment to start. So that neither happens on a full disk,
// which sandboxes may fill at any time, the store owns room ahead of need: below its database, and in a file that makes way
// for the start. File systems that never overwrite in place, such as btrfs and ZFS, do not honour the first.
const (
	databaseBytes = 32 << 20
	spareBytes    = 32 << 20
	spareName     = "spare"
)

// giveSpare makes room for a start on a disk that has none, the starts of others in this process included; Run takes it again.
func giveSpare(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("read free space of %s: %w", dir, err)
	}
	if int64(fs.Bavail)*fs.Bsize >= spareBytes { //nolint:gosec // no disk has 2^63 bytes
		return nil
	}
	if err := os.Remove(filepath.Join(dir, spareName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("give way: %w", err)
	}
	f, err := os.Open(dir) //nolint:gosec // the operator's data directory
	if err != nil {
		return fmt.Errorf("give way: %w", err)
	}
	defer func() { _ = f.Close() }()
	// A file system may hand freed blocks out only once that is on the disk.
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("give way: %w", err)
	}
	return nil
}

// reserve takes room for the database.
func reserve(dir string) error {
	return allocate(filepath.Join(dir, "member", "snap", "db"), databaseBytes)
}

// takeSpare takes room for the next start.
func takeSpare(dir string) error { return allocate(filepath.Join(dir, spareName), spareBytes) }

// allocate sees to it that the first n bytes of a file, or what it may grow to, have their place on the disk.
func allocate(path string, n int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) //nolint:gosec // in the store's own directory
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil // this file system cannot
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("take %d MiB for %s: %w", n>>20, path, err)
	}
	return nil
}
