package chaos

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The wall clock of one process is stepped where the process reads it: in the vDSO, the code that the kernel maps into each
// process so that it need not be called for the time. A jump at the begin of __vdso_clock_gettime leads to code of ours in the
// unused rest of the vDSO's last page, which makes the system call and, for the wall clock alone, adds the seconds beside it.
// The pages become the process's own as they are written, so nobody else's clock changes. Whoever makes the system call by
// itself, and the kernel's own stamps of files, have the machine's time.

// canSkew says whether the code below is for this machine.
const canSkew = runtime.GOARCH == "amd64"

const (
	vdsoSymbol = "__vdso_clock_gettime"
	// detourBytes is the length of the jump, tailBytes how much of the last page's end is taken.
	detourBytes, tailBytes = 5, 64
	// offsetAt is where in the tail the seconds are.
	offsetAt = 48
	// skewTries bounds how often a process is stopped anew because a thread stood where the jump is to be written, and for how
	// many milliseconds its program may take to be loaded.
	skewTries = 100
)

// detour is int clock_gettime(clockid_t edi, struct timespec *rsi). A system call leaves alone all registers but rax, rcx, r11.
//
//nolint:gochecknoglobals // a table, never written
var detour = []byte{
	0xb8, 0xe4, 0x00, 0x00, 0x00, // mov $228, %eax
	0x0f, 0x05, // syscall
	0x85, 0xff, // test %edi, %edi: CLOCK_REALTIME is 0
	0x75, 0x0e, // jne out
	0x85, 0xc0, // test %eax, %eax
	0x75, 0x0a, // jne out
	0x48, 0x8b, 0x0d, offsetAt - 22, 0x00, 0x00, 0x00, // mov offset(%rip), %rcx
	0x48, 0x01, 0x0e, // add %rcx, (%rsi)
	0xc3, // out: ret
}

// vdso is where a process has what is changed.
type vdso struct {
	symbol, tail uint64
	// free is what the tail holds before the first change: nothing, in which case the process reads the machine's clock.
	free bool
}

// skew sets by how much the wall clock of a process differs from the machine's, in whole seconds. A process that stands still
// goes on standing still.
func skew(pid int, by time.Duration) error {
	err := errNoVDSO
	for range skewTries {
		if err = skewProcess(pid, by); !errors.Is(err, errNoVDSO) {
			break
		}
		pause(context.Background(), time.Millisecond) // its program is being loaded
	}
	if err != nil {
		return fmt.Errorf("set the clock of process %d apart by %s: %w", pid, by, err)
	}
	return nil
}

var errNoVDSO = errors.New("no vdso in its memory")

func skewProcess(pid int, by time.Duration) (err error) {
	mem, err := os.OpenFile(procPath(pid, "mem"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mem.Close()) }()
	v, err := findVDSO(pid, mem)
	if err != nil {
		return err
	}
	if _, err := mem.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(by/time.Second)), int64(v.tail+offsetAt)); err != nil { //nolint:gosec // a negative one wraps as it is to
		return fmt.Errorf("write the offset: %w", err)
	}
	if !v.free {
		return nil
	}
	if _, err := mem.WriteAt(detour, int64(v.tail)); err != nil { //nolint:gosec // an address of a process is positive
		return fmt.Errorf("write the detour: %w", err)
	}
	jump := binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(v.tail-v.symbol-detourBytes)) //nolint:gosec // both are in one mapping
	return whileStopped(pid, v.symbol+1, v.symbol+detourBytes, func() error {
		_, err := mem.WriteAt(jump, int64(v.symbol)) //nolint:gosec // as above
		return err
	})
}

func procPath(pid int, parts ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(pid)}, parts...)...)
}

// findVDSO looks into the memory of a process.
func findVDSO(pid int, mem io.ReaderAt) (vdso, error) {
	maps, err := os.ReadFile(procPath(pid, "maps"))
	if err != nil {
		return vdso{}, err
	}
	var from, to uint64
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(line, "[vdso]\n") {
			_, err = fmt.Sscanf(line, "%x-%x ", &from, &to)
			break
		}
	}
	if err != nil || to <= from {
		return vdso{}, errors.Join(errNoVDSO, err)
	}
	image := make([]byte, to-from)
	if _, err := mem.ReadAt(image, int64(from)); err != nil {
		return vdso{}, fmt.Errorf("read the vdso: %w", err)
	}
	v, err := parseVDSO(image)
	v.symbol, v.tail = v.symbol+from, v.tail+from
	return v, err
}

func parseVDSO(image []byte) (vdso, error) {
	file, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return vdso{}, fmt.Errorf("parse the vdso: %w", err)
	}
	symbols, err := file.DynamicSymbols()
	if err != nil {
		return vdso{}, fmt.Errorf("parse the vdso's symbols: %w", err)
	}
	i := slices.IndexFunc(symbols, func(s elf.Symbol) bool { return s.Name == vdsoSymbol && s.Size >= detourBytes })
	if i < 0 {
		return vdso{}, fmt.Errorf("the vdso has no %s", vdsoSymbol)
	}
	v := vdso{symbol: symbols[i].Value, tail: uint64(len(image)) - tailBytes}
	tail := image[v.tail:]
	v.free = !bytes.HasPrefix(tail, detour)
	if v.free && slices.ContainsFunc(tail, func(b byte) bool { return b != 0 }) {
		return vdso{}, errors.New("the vdso has no room at its end")
	}
	return v, nil
}

// whileStopped calls f while no thread of the process runs, and none is to go on at an address of [from, to).
func whileStopped(pid int, from, to uint64, f func() error) error {
	if stood, err := stands(pid); err != nil {
		return err
	} else if !stood {
		defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }() // it may have been killed
	}
	for range skewTries {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return err
		}
		for stood := false; !stood; {
			var err error
			if stood, err = stands(pid); err != nil {
				return err
			}
			runtime.Gosched()
		}
		at, err := within(pid, from, to)
		if err != nil {
			return err
		}
		if !at {
			return f()
		}
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			return err
		}
	}
	return errors.New("a thread stands in the way each time")
}

// stands reports whether no thread of a process runs.
func stands(pid int) (bool, error) {
	tasks, err := filepath.Glob(procPath(pid, "task", "*", "stat"))
	if err != nil || len(tasks) == 0 {
		return false, errors.Join(errors.New("it has ended"), err)
	}
	for _, path := range tasks {
		raw, err := os.ReadFile(path) //nolint:gosec // below /proc
		if err != nil {
			continue // this thread has ended
		}
		// The state follows the name, which is in parentheses and may hold anything.
		if state := bytes.TrimSpace(raw[bytes.LastIndexByte(raw, ')')+1:]); len(state) > 0 && !bytes.ContainsAny(state[:1], "TtZX") {
			return false, nil
		}
	}
	return true, nil
}

// within reports whether a thread of a stopped process is to go on at an address of [from, to).
func within(pid int, from, to uint64) (bool, error) {
	tasks, err := filepath.Glob(procPath(pid, "task", "*", "syscall"))
	if err != nil {
		return false, err
	}
	for _, path := range tasks {
		raw, err := os.ReadFile(path) //nolint:gosec // below /proc
		if err != nil {
			continue // this thread has ended
		}
		fields := strings.Fields(string(raw)) // the last one is where it goes on
		if len(fields) < 3 {
			return true, nil // it runs
		}
		pc, err := strconv.ParseUint(fields[len(fields)-1], 0, 64)
		if err != nil {
			return false, fmt.Errorf("parse %s: %w", path, err)
		}
		if from <= pc && pc < to {
			return true, nil
		}
	}
	return false, nil
}
