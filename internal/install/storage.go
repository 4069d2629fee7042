package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// storageFacts is what was found where sandboxes' files are, or will be.
type storageFacts struct {
	// dir is the nearest directory that exists.
	dir string
	// clone says what became of a reflink; with an image that is not in use yet, it is not tried.
	clone error
	image bool
	// mounted says whether the image is in use.
	mounted bool
	// mkfs, loop and xfs say what an image needs and the machine lacks.
	mkfs, loop, xfs error
}

func checkStorage(_ context.Context, s Settings) []Finding {
	if s.DataDir == "" {
		return nil
	}
	return judgeStorage(s.DataDir, gatherStorage(s))
}

func gatherStorage(s Settings) storageFacts {
	f := storageFacts{image: s.Image}
	dir := s.NodeDir
	if dir == "" {
		dir = s.DataDir
	}
	f.dir, f.clone = nearestDir(dir)
	if f.clone == nil {
		f.clone = tryCloneIn(f.dir)
	}
	if !s.Image {
		return f
	}
	f.mounted = f.dir == dir && mountPoint(dir)
	_, f.mkfs = exec.LookPath("mkfs.xfs")
	f.loop = openDevice("/dev/loop-control")
	f.xfs = haveXFS()
	return f
}

// mountPoint reports whether a file system is mounted at a directory.
func mountPoint(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_BASIC_STATS, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// haveXFS finds XFS in the kernel or among the modules that it can load.
func haveXFS() error {
	text, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	if strings.Contains(string(text), "\txfs\n") {
		return nil
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	pattern := filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]), "kernel/fs/xfs/xfs.ko*")
	if found, err := filepath.Glob(pattern); err != nil || len(found) > 0 {
		return err
	}
	return errors.New("neither in the kernel nor among its modules")
}

func tryCloneIn(dir string) (err error) {
	work, err := os.MkdirTemp(dir, ".cloister-preflight-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	return tryClone(work)
}

func tryClone(dir string) (err error) {
	from, err := os.OpenFile(filepath.Join(dir, "from"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // our own directory
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	if _, err := from.Write(make([]byte, 64<<10)); err != nil {
		return err
	}
	to, err := os.OpenFile(filepath.Join(dir, "to"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // our own directory
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	return unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
}

// lost is what a machine without reflinks does without.
const lost = "pause, resume, snapshot and fork copy what a sandbox has written to its disk: slower and more disk the more it wrote"

func judgeStorage(dataDir string, f storageFacts) []Finding {
	if f.image && !f.mounted {
		return []Finding{judgeImage(f)}
	}
	if f.clone == nil {
		return []Finding{ok("reflinks", "files are cloned without copying")}
	}
	if f.image {
		return []Finding{fail("reflinks", fmt.Sprintf("%s is mounted, but files cannot be cloned there: %v", f.dir, f.clone), "`cloister down`, unmount "+f.dir+", and start again")}
	}
	return []Finding{warn("reflinks", fmt.Sprintf("%s cannot clone files (%v): %s", f.dir, f.clone, lost),
		"`cloister up --storage image` on a new data directory, or "+dataDir+" on XFS (mkfs.xfs -m reflink=1) or btrfs")}
}

// judgeImage says whether storage.img can be made and mounted.
func judgeImage(f storageFacts) Finding {
	const check = "storage image"
	switch {
	case f.xfs != nil:
		return fail(check, fmt.Sprintf("this kernel has no XFS: %v", f.xfs), "modprobe xfs, or --storage dir")
	case f.loop != nil:
		return fail(check, fmt.Sprintf("loop devices cannot be used: %v", f.loop), "modprobe loop; in a container give it the machine's /dev and the capability SYS_ADMIN; or --storage dir")
	case f.mkfs != nil:
		return fail(check, "mkfs.xfs is not installed", "apt-get install -y xfsprogs, or your distribution's package xfsprogs")
	}
	return ok(check, "storage.img can be made and mounted")
}
