package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// process is a sentry, whether a child of this process or not. The pidfd names it beyond doubt, also once its number
// belongs to another process.
type process struct {
	pid   int
	start uint64 // in clock ticks since the machine's start
	fd    *os.File
	// closed is set before fd is closed, which may be while others use it.
	closed atomic.Bool
}

// openProcess returns the process pid. With start not zero it must also have been started then: the error is unix.ESRCH
// otherwise, and when there is no such process.
func openProcess(pid int, start uint64) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	p := &process{pid: pid, start: startTicks(pid), fd: os.NewFile(uintptr(fd), "pidfd")}
	if p.start == 0 || start != 0 && p.start != start {
		p.close()
		return nil, unix.ESRCH
	}
	return p, nil
}

// close gives up the pidfd; the process goes on.
func (p *process) close() {
	p.closed.Store(true)
	_ = p.fd.Close() // nothing was written
}

// kill ends the process. It is no error when it has ended.
func (p *process) kill() error {
	return p.control(func(fd int) error {
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); !errors.Is(err, unix.ESRCH) {
			return err
		}
		return nil
	})
}

// end kills the process, which is a child of this one, and gives it up. One that died by itself is in no list any more, and
// would stay as a zombie.
func (p *process) end(ctx context.Context) {
	_ = p.kill() // Stop clears away what remains
	if p.wait(ctx) == nil {
		p.reap()
	}
	p.close()
}

// control runs f with the pidfd. The error is os.ErrClosed once it was given up.
func (p *process) control(f func(fd int) error) error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = f(int(fd)) })
	if err != nil && p.closed.Load() {
		return os.ErrClosed
	}
	return errors.Join(err, inner)
}

// ended reports whether the process and all in its PID namespace have ended.
func (p *process) ended() bool {
	over := true // a closed pidfd is that of a process that was seen to end
	_ = p.control(func(fd int) error { over = readable(fd); return nil })
	return over
}

// readable reports whether a pidfd's process has ended.
func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// wait blocks until the process has ended or ctx has; it costs a descriptor, not a thread.
func (p *process) wait(ctx context.Context) error {
	var dup int
	err := p.control(func(fd int) (err error) {
		dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(dup), "pidfd")
	defer func() { _ = f.Close() }() // nothing was written
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if err := raw.Read(func(fd uintptr) bool { return readable(int(fd)) }); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	return nil
}

// status is how a process ended. Known is false where the kernel no longer tells.
type status struct {
	known bool
	wait  unix.WaitStatus
}

// reap collects the status of a process that has ended, and with it the zombie of a child.
func (p *process) reap() status {
	var ws unix.WaitStatus
	for {
		pid, err := unix.Wait4(p.pid, &ws, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && pid == p.pid:
			return status{known: true, wait: ws}
		}
		return p.foreignStatus()
	}
}

// foreignStatus asks for the status of a process that is not our child, which Linux 6.15 and later keep for the holders of
// a pidfd once its parent has reaped it.
func (p *process) foreignStatus() status {
	var s status
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := p.control(func(fd int) error {
			info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
			if err := unix.IoctlPidfdInfo(fd, &info); err != nil {
				return err
			}
			if info.Mask&unix.PIDFD_INFO_EXIT != 0 {
				s = status{known: true, wait: unix.WaitStatus(info.Exit_code)} //nolint:gosec // the kernel's wait status
			}
			return nil
		})
		if err != nil || s.known {
			return s
		}
		select {
		case <-ctx.Done():
			return s
		case <-tick.C:
		}
	}
}

// startTicks returns when a process was started, in clock ticks since the machine's start; 0 when it does not exist.
func startTicks(pid int) uint64 {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0
	}
	// The second field is the name in parentheses, which can itself hold blanks and parentheses.
	i := bytes.LastIndexByte(raw, ')')
	if i < 0 {
		return 0
	}
	const field = 22 - 3 // counted from the third
	fields := bytes.Fields(raw[i+1:])
	if len(fields) <= field {
		return 0
	}
	ticks, err := strconv.ParseUint(string(fields[field]), 10, 64)
	if err != nil {
		return 0
	}
	return ticks
}

// findSentries returns the processes whose arguments say that they are the sentry of the guest in bundle. It looks at
// every process of the machine and is for guests without a record alone.
func findSentries(bundle string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	want := []byte("\x00--bundle=" + bundle + "\x00")
	var out []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && bytes.HasPrefix(raw, []byte("runsc-sandbox\x00")) && bytes.Contains(raw, want) {
			out = append(out, pid)
		}
	}
	return out
}

// killAll ends processes by number and waits until they are gone.
func killAll(ctx context.Context, pids []int) error {
	for _, pid := range pids {
		p, err := openProcess(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open process %d: %w", pid, err)
		}
		err = p.kill()
		if err == nil {
			err = p.wait(ctx)
		}
		if err == nil {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // it may be our child
		}
		p.close()
		if err != nil {
			return fmt.Errorf("end process %d: %w", pid, err)
		}
	}
	return nil
}
