package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// loopBlock is the block size of loop devices in bytes: that of pages, with which direct I/O is fastest.
const loopBlock = 4096

// loopMajor is the major number of loop devices.
const loopMajor = 7

// mounted reports whether the image is mounted at the node's directory in this mount namespace.
func (s storage) mounted() (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, s.node, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look at %s: %w", s.node, err)
	case st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 || st.Dev_major != loopMajor:
		return false, nil
	}
	dev, err := attached(s.image)
	if err != nil || dev == nil {
		return false, err
	}
	defer func() { _ = dev.Close() }() // only read
	var of unix.Stat_t
	if err := unix.Fstat(int(dev.Fd()), &of); err != nil {
		return false, fmt.Errorf("look at %s: %w", dev.Name(), err)
	}
	return of.Rdev == unix.Mkdev(st.Dev_major, st.Dev_minor), nil
}

// attached returns the open loop device whose file is the image, or nil. The names that sysfs has for backing files are of the
// namespace that attached them, so it is the inode that counts.
func attached(image string) (*os.File, error) {
	var of unix.Stat_t
	if err := unix.Stat(image, &of); err != nil {
		return nil, fmt.Errorf("look at %s: %w", image, err)
	}
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(name))))
		f, err := os.OpenFile(device, os.O_RDWR, 0) //nolint:gosec // a loop device
		if err != nil {
			continue // detached meanwhile, or another namespace's
		}
		if info, err := unix.IoctlLoopGetStatus64(int(f.Fd())); err == nil && info.Device == of.Dev && info.Inode == of.Ino {
			return f, nil
		}
		_ = f.Close()
	}
	return nil, nil
}

// attach gives the image a loop device. It is detached when it has been closed and is not mounted any more.
func attach(ctx context.Context, image string) (*os.File, error) {
	back, err := os.OpenFile(image, os.O_RDWR, 0) //nolint:gosec // our own file
	if err != nil {
		return nil, err
	}
	defer func() { _ = back.Close() }() // the device holds it
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, noLoop(err)
	}
	defer func() { _ = control.Close() }() // nothing was written
	for {
		dev, err := attachFree(control, back)
		if !errors.Is(err, unix.EBUSY) {
			return dev, err
		}
		if ctx.Err() != nil { // others were faster each time
			return nil, fmt.Errorf("attach a loop device: %w", errors.Join(err, ctx.Err()))
		}
	}
}

// attachFree tries the device that is free now; unix.EBUSY when another process took it meanwhile.
func attachFree(control, back *os.File) (*os.File, error) {
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, noLoop(fmt.Errorf("find a free loop device: %w", err))
	}
	dev, err := openLoop(fmt.Sprintf("/dev/loop%d", n))
	if err != nil {
		return nil, noLoop(err)
	}
	conf := unix.LoopConfig{
		Fd: uint32(back.Fd()), Size: loopBlock, //nolint:gosec // a descriptor
		// Direct I/O keeps each page of the image in memory once, not twice, and syncs several times faster. A disk that cannot do
		// it goes on without.
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO},
	}
	copy(conf.Info.File_name[:len(conf.Info.File_name)-1], back.Name()) // for people; the kernel keeps the file itself
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &conf); err != nil {
		_ = dev.Close()
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
			return nil, sandbox.Unsupportedf("attach %s to %s: %v: --storage image needs Linux 5.8 or later", back.Name(), dev.Name(), err)
		}
		return nil, fmt.Errorf("attach %s to %s: %w", back.Name(), dev.Name(), err)
	}
	return dev, nil
}

// openLoop opens a loop device. One that was made just now appears a moment later where a program makes the device files.
func openLoop(name string) (*os.File, error) {
	deadline := time.NewTimer(2 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		f, err := os.OpenFile(name, os.O_RDWR, 0) //nolint:gosec // a loop device
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return nil, err
		}
	}
}

// noLoop explains why there is no loop device.
func noLoop(err error) error {
	return sandbox.Unsupportedf("--storage image needs loop devices, and there are none to use: %v: load the module loop, and in a container "+
		"give it the machine's /dev and the capability SYS_ADMIN; or use --storage dir", err)
}

// tellSize lets the loop device know that its file has grown.
func (s storage) tellSize() error {
	dev, err := attached(s.image)
	if err != nil {
		return err
	}
	if dev == nil {
		return fmt.Errorf("grow %s: it is attached to no loop device", s.image)
	}
	defer func() { _ = dev.Close() }() // nothing was written
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("grow %s: %w", dev.Name(), err)
	}
	return nil
}
