package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
)

// Files that the parent hands to a new sentry beyond those that gVisor knows travel as --pass-fd=<fd>:<number>, where the
// number is one that no guest asks for. takeFiles removes them again, so that the guest never sees them.
const (
	bootFile    = 1 << 28
	joinFile    = 1<<28 + 1 // and the numbers that follow, one per hierarchy
	maxJoin     = 16
	maxBootJSON = 4096
)

// boot is what a new sentry must know and gVisor's own arguments cannot tell it.
type boot struct {
	CPUs        int64 `json:"cpus"`
	MemoryBytes int64 `json:"memory_bytes"`
}

// Maybe runs the sentry or the server of a checkpoint's files, and never returns, when this process is a re-execution of the
// binary as one of them; otherwise it returns at once. It must be the first line of main, and of TestMain where tests use the engine.
func Maybe() {
	maybeServeFiles()
	switch {
	case filepath.Base(os.Args[0]) == "runsc-sandbox":
		runtime.LockOSThread()
		if err := prepareSentry(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare sentry:", err)
			unix.Exit(1)
		}
		collectLater()
		registerSeccomp()
	case os.Args[0] == "/proc/self/exe" && len(os.Args) > 1 && os.Args[1] == "umount":
	default:
		return
	}
	cli.Run(nil, map[util.SubCommand]string{
		new(sentrycmd.Boot):   "",
		new(sentrycmd.Umount): "",
	}, nil)
}

// A sentry's heap grows from nothing to its size within its first 50 milliseconds. Go would collect it several times on the
// way, which takes a fifth of the processor time of a start, so the first collection waits for a heap of 32 MiB or a second.
const (
	startGCPercent = 800 // of 4 MiB
	startGCWait    = time.Second
)

// collectLater puts off the collection of garbage until the sentry has started.
func collectLater() {
	usual := debug.SetGCPercent(startGCPercent)
	time.AfterFunc(startGCWait, func() {
		debug.SetGCPercent(usual)
		debug.FreeOSMemory() // a guest that does nothing would keep the garbage for minutes
	})
}

// prepareSentry turns the arguments that gVisor gave this process into those that its boot command shall see. A sentry
// executes itself a second time as nobody, with nothing left to prepare.
func prepareSentry() error {
	if err := dropForeign(os.Args); err != nil {
		return err
	}
	args, taken := takeFiles(os.Args)
	for number, fd := range taken {
		if number != bootFile {
			if err := joinGroup(fd); err != nil {
				return err
			}
		}
	}
	if fd, ok := taken[bootFile]; ok {
		b, err := readBoot(fd)
		if err != nil {
			return err
		}
		if err := silence(args); err != nil {
			return err
		}
		args = sized(args, b)
	}
	for _, fd := range taken {
		_ = unix.Close(fd) // cannot fail in a way that matters: the descriptor is ours and open
	}
	os.Args = args
	return nil
}

// takeFiles splits args into those without our own files and the descriptors of these files.
func takeFiles(args []string) (rest []string, taken map[int]int) {
	taken = map[int]int{}
	for _, a := range args {
		if fd, number, ok := passedFile(a); ok && number >= bootFile && number <= joinFile+maxJoin {
			taken[number] = fd
			continue
		}
		rest = append(rest, a)
	}
	return rest, taken
}

// passedFile parses --pass-fd=<fd>:<number>.
func passedFile(arg string) (fd, number int, ok bool) {
	v, found := strings.CutPrefix(arg, "--pass-fd=")
	if !found {
		return 0, 0, false
	}
	host, guest, found := strings.Cut(v, ":")
	fd, err1 := strconv.Atoi(host)
	number, err2 := strconv.Atoi(guest)
	return fd, number, found && err1 == nil && err2 == nil
}

// joinGroup moves this thread, which becomes the sentry at the next execution, into the control group whose tasks file
// is open as fd. Moving oneself spares the lock on all forks of the machine that moving another process takes, with its
// ten milliseconds. Where the kernel refuses, the parent moves the process later. But when the group is gone, so is the
// parent, and somebody has cleared this guest away before it began: a sentry must not come after that.
func joinGroup(fd int) error {
	switch _, err := unix.Write(fd, []byte("0")); {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("join control group: %w", err)
	case err != nil:
		fmt.Fprintln(os.Stderr, "join control group:", err)
	}
	return nil
}

func readBoot(fd int) (boot, error) {
	buf := make([]byte, maxBootJSON)
	n, err := unix.Pread(fd, buf, 0)
	if err != nil {
		return boot{}, fmt.Errorf("read boot parameters: %w", err)
	}
	var b boot
	if err := json.Unmarshal(buf[:n], &b); err != nil {
		return boot{}, fmt.Errorf("parse boot parameters: %w", err)
	}
	return b, nil
}

// silence puts /dev/null where the parent's standard streams are: those would be the guest's.
func silence(args []string) error {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	defer func() { _ = unix.Close(null) }() // opened above
	for _, a := range args {
		v, ok := strings.CutPrefix(a, "--stdio-fds=")
		if !ok {
			continue
		}
		fd, err := strconv.Atoi(v)
		if err != nil {
			return fmt.Errorf("standard stream %q: %w", v, err)
		}
		if err := unix.Dup3(null, fd, 0); err != nil {
			return fmt.Errorf("replace standard stream %d: %w", fd, err)
		}
	}
	return nil
}

// sized replaces the size of the machine, which gVisor takes from the host, by the guest's own.
func sized(args []string, b boot) []string {
	out := slices.Clone(args)
	if i := slices.Index(out, "--total-memory"); i >= 0 && i+1 < len(out) {
		out[i+1] = strconv.FormatInt(b.MemoryBytes, 10)
	}
	if i := slices.Index(out, "boot"); i >= 0 {
		out = slices.Insert(out, i+1, "--cpu-num="+strconv.FormatInt(b.CPUs, 10))
	}
	return out
}
