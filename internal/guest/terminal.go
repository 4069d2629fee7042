package guest

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

// Size of a terminal whose client gave none.
const (
	defaultCols = 80
	defaultRows = 24
)

// openPTY returns a new terminal's two ends. Ours does not block, so that reads can be given a deadline; the other is
// for a process, which does not expect that.
func openPTY() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open a terminal: %w", err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	number, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	var other int
	name := "/dev/pts/" + strconv.FormatUint(uint64(number), 10)
	if err == nil {
		other, err = unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open a terminal: %w", err), master.Close())
	}
	return master, os.NewFile(uintptr(other), name), nil
}

// resize tells a terminal and its processes a new size.
func resize(master *os.File, size *unix.Winsize) error {
	conn, err := master.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := conn.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, size) })
	if err = errors.Join(controlErr, err); err != nil {
		return fmt.Errorf("set the terminal's size: %w", err)
	}
	return nil
}

// winsize clamps what a client asks for.
func winsize(size *process.PTY_Size) *unix.Winsize {
	clamp := func(n uint32, fallback uint16) uint16 {
		if n == 0 {
			return fallback
		}
		return uint16(min(n, math.MaxUint16))
	}
	return &unix.Winsize{Col: clamp(size.GetCols(), defaultCols), Row: clamp(size.GetRows(), defaultRows)}
}
