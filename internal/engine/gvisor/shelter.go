package gvisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	// shelter is the group into which the processes of a container's own group are moved. Other programs that run
	// containers in containers use the name for the same.
	shelter = "init"

	// roomTries bounds the races with processes that are born meanwhile.
	roomTries = 16
)

// makeRoom readies the mounted root of version 2 for children with limits, and returns how many processes it moved. Such a
// group cannot have processes of its own, unless it is the machine's root. In a container it is the container's group, and
// has all that runs there; these move one level down, where they stay under every limit of the container. Only a process
// that is one of them may decide that: otherwise nothing is moved, and making the parent says why it cannot be done.
func makeRoom(root string) (moved int, err error) {
	if _, err := os.Stat(filepath.Join(root, "cgroup.type")); errors.Is(err, os.ErrNotExist) {
		return 0, nil // only the machine's root has no such file
	}
	if hasAll(filepath.Join(root, "cgroup.subtree_control")) {
		return 0, nil
	}
	procs, dir := filepath.Join(root, "cgroup.procs"), filepath.Join(root, shelter)
	own := append(readPIDs(procs), readPIDs(filepath.Join(dir, "cgroup.procs"))...)
	if !slices.Contains(own, os.Getpid()) {
		return 0, nil
	}
	for range roomTries {
		pids := readPIDs(procs)
		if len(pids) == 0 {
			break
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) { //nolint:gosec // control groups are readable by all
			return moved, fmt.Errorf("make control group: %w", err)
		}
		for _, pid := range pids {
			err := writeFile(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid))
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return moved, fmt.Errorf("move process %d into %s: %w", pid, dir, err)
			}
			moved++
		}
	}
	return moved, nil
}
