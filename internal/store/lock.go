package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// lockName is the file whose lock says that a process uses the directory. It holds that process's id, for people.
const lockName = "store.lock"

// lockDir takes the directory for this process; closing the file, or the end of the process, gives it back. Without it
// a second etcd would wait for the first one's database file for ever.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) //nolint:gosec // the path is the operator's data directory
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		held := f
		defer func() { _ = held.Close() }()
		return nil, sandbox.Conflictf("store directory %s is in use by %s: stop it, or choose another data directory",
			dir, holder(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(fmt.Errorf("write lock %s: %w", path, err), f.Close())
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("write lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

// holder names the process that the lock file speaks of.
func holder(path string) string {
	const most = 32
	data, err := os.ReadFile(path) //nolint:gosec // as in lockDir
	if text := strings.TrimSpace(string(data)); err == nil && text != "" && len(text) < most {
		return "process " + text
	}
	return "another process"
}
