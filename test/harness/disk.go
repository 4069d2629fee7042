package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// disk gives the machine's data directory a file system of its own, with nothing of it reserved for root. The machine has
// not been started yet. It goes with the machine.
func (m *Machine) disk(size string) {
	m.lab.tb.Helper()
	image := filepath.Join(m.Dir, "disk.img")
	err := os.MkdirAll(m.DataDir(), 0o700)
	for _, args := range [][]string{
		{"truncate", "-s", size, image}, {"mkfs.ext4", "-q", "-F", "-m", "0", image}, {"mount", "-o", "loop", image, m.DataDir()},
	} {
		if err == nil {
			err = command(args...)
		}
	}
	if err != nil {
		m.lab.tb.Fatalf("%s: make a disk: %v", m.Name, err)
	}
}

func command(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil { //nolint:gosec // our own commands
		return fmt.Errorf("%v: %w: %s", args, err, out)
	}
	return nil
}

// unmount takes away the file system of a machine's data directory, if it has one of its own.
func unmount(tb testing.TB, data string) {
	tb.Helper()
	var own, above syscall.Stat_t
	if syscall.Stat(data, &own) != nil || syscall.Stat(filepath.Dir(data), &above) != nil || own.Dev == above.Dev {
		return
	}
	if err := command("umount", "-l", data); err != nil {
		tb.Error(err)
	}
}

// filler is the file that fills a machine's disk.
func (m *Machine) filler() string { return filepath.Join(m.DataDir(), "filler") }

// Fill leaves no byte free on the disk of the machine, which has one of its own. Free gives the room back.
func (m *Machine) Fill() error {
	f, err := os.Create(m.filler())
	if err != nil {
		return fmt.Errorf("fill the disk of %s: %w", m.Name, err)
	}
	var stat syscall.Statfs_t
	if err = syscall.Fstatfs(int(f.Fd()), &stat); err == nil { // as a descriptor it is small
		const slack = 8 << 20                                                                       // what the file's own tables may take
		err = syscall.Fallocate(int(f.Fd()), 0, 0, max(1<<20, int64(stat.Bavail)*stat.Bsize-slack)) //nolint:gosec // no disk has 2^63 bytes
	}
	if err == nil || errors.Is(err, syscall.ENOSPC) {
		_, err = f.Seek(0, 2)
	}
	for size := 1 << 20; size >= 512; size /= 2 {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if errors.Is(err, syscall.ENOSPC) {
			err = nil
		}
	}
	_ = f.Sync() // what could be written is
	if closed := f.Close(); err == nil && !errors.Is(closed, syscall.ENOSPC) {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("fill the disk of %s: %w", m.Name, err)
	}
	return nil
}

// Free undoes Fill.
func (m *Machine) Free() error {
	if err := os.Remove(m.filler()); err != nil {
		return fmt.Errorf("free the disk of %s: %w", m.Name, err)
	}
	return nil
}
