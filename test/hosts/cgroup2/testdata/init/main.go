// Command init is the first process of the test machine: it makes a machine with control groups of version 2 out of a
// bare kernel, runs the programs that the disk lists, and turns the machine off.
//
// The console takes what the kernel and init say, the second serial port what the programs say. A program is a line of
// /suite on the disk: its name and then its command. After its output comes "== <name>: status <number>".
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	modules = "/modules" // in the order of their loading, as 00-name.ko
	disk    = "/dev/vda"
	results = "/dev/ttyS1"
)

func main() {
	if filepath.Base(os.Args[0]) == "sleep" { // what tests start to have a process
		_ = unix.Pause()
		return
	}
	if err := run(); err != nil {
		fmt.Println("init:", err)
	}
	unix.Sync()
	fmt.Println("init: power off:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

func run() error {
	if err := load(); err != nil {
		return err
	}
	if err := mountAll(); err != nil {
		return err
	}
	out, err := os.OpenFile(results, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := plain(out); err != nil {
		return err
	}
	list, err := os.ReadFile("/suite")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		begin := time.Now()
		status, err := execute(out, f[1:])
		if err != nil {
			return fmt.Errorf("run %s: %w", f[0], err)
		}
		fmt.Printf("init: %s took %v\n", f[0], time.Since(begin).Round(time.Millisecond))
		fmt.Fprintf(out, "\n== %s: status %d\n", f[0], status)
	}
	return nil
}

// load loads the kernel's modules.
func load() error {
	files, err := filepath.Glob(modules + "/*.ko")
	if err != nil {
		return err
	}
	for _, file := range files { // sorted
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", file, err)
		}
		_ = f.Close()
	}
	return nil
}

// mountAll makes the disk the root: the first root of a kernel cannot be left, which sentries do. Then it mounts the rest.
func mountAll() error {
	for _, m := range []struct{ source, dir, kind, options string }{
		{"dev", "/dev", "devtmpfs", ""},
		{disk, "/disk", "ext4", ""},
		{"dev", "/disk/dev", "devtmpfs", ""},
		{"proc", "/disk/proc", "proc", ""},
		{"sys", "/disk/sys", "sysfs", ""},
		{"cgroup", "/disk/sys/fs/cgroup", "cgroup2", "nsdelegate"},
		{"run", "/disk/run", "tmpfs", ""},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.source, m.dir, m.kind, 0, m.options)
		for range 100 { // the disk takes a moment to appear
			if !errors.Is(err, unix.ENOENT) {
				break
			}
			<-time.After(20 * time.Millisecond)
			err = unix.Mount(m.source, m.dir, m.kind, 0, m.options)
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := os.Chdir("/disk"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("make the disk the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// plain keeps the serial port from changing what is written to it.
func plain(f *os.File) error {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	t.Oflag &^= unix.OPOST
	return unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

// execute runs a program to its end, and meanwhile reaps the processes that nobody else does.
func execute(out *os.File, args []string) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess(args[0], args, &os.ProcAttr{
		Env:   []string{"PATH=/bin", "HOME=/", "TMPDIR=/tmp", "REQUIRE_HOSTS=1", "GVISOR_TEST_GUEST=/bin/guest"},
		Files: []*os.File{null, out, out},
	})
	if err != nil {
		return 0, err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case pid == p.Pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil
		case pid == p.Pid:
			return ws.ExitStatus(), nil
		}
	}
}
