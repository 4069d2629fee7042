package gvisor

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// dropForeign gets rid of the files that this process has inherited and that no argument names. gVisor opens some of a
// guest's sockets in the daemon without close-on-exec. Its packet socket among them: a sentry that is started before that
// one is closed would hold the wire of another guest, so packet sockets are closed at once. The rest goes when the sentry
// executes itself the second time; left open, a number that the sentry wants for itself may be taken.
func dropForeign(args []string) error {
	named := namedFiles(args)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open files: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= unix.Stderr {
			continue
		}
		if isPacketSocket(fd) {
			if err := unix.Close(fd); err != nil {
				return fmt.Errorf("close packet socket %d: %w", fd, err)
			}
			continue
		}
		if !named[fd] {
			unix.CloseOnExec(fd) // the directory that was just read is closed already: no harm
		}
	}
	return nil
}

func isPacketSocket(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_PACKET
}

// holdForeign keeps the packet sockets open that gVisor has left to this process's garbage collector, until the returned
// function is called. Whoever closes one last waits until the kernel has told all processors, for up to 100 ms: without
// this, that is now and then a sentry which has inherited it.
func holdForeign() (release func()) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return func() {} // a slow start is no reason for none
	}
	var held []int
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || slices.Contains(held, fd) || !isPacketSocket(fd) { // held: the number was that of the directory
			continue
		}
		if dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, unix.Stderr+1); err == nil { // else it was closed just now
			held = append(held, dup)
		}
	}
	return func() {
		for _, fd := range held {
			_ = unix.Close(fd) // nothing was written
		}
	}
}

// namedFiles returns the descriptors that the arguments name: --controller-fd=7, --stdio-fds=3,4,5, --pass-fd=9:1.
func namedFiles(args []string) map[int]bool {
	named := map[int]bool{}
	for _, a := range args {
		name, value, _ := strings.Cut(a, "=")
		if !strings.HasPrefix(name, "--") || !strings.HasSuffix(strings.TrimSuffix(name, "s"), "-fd") {
			continue
		}
		for part := range strings.FieldsFuncSeq(value, func(r rune) bool { return r == ',' || r == ':' }) {
			if fd, err := strconv.Atoi(part); err == nil {
				named[fd] = true
			}
		}
	}
	return named
}
