package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// diskFacts is what was found where the data directory is, or will be.
type diskFacts struct {
	// dir is the nearest directory that exists.
	dir         string
	err         error // that prevents every test
	kind        string
	free, total int64
	freeInodes  int64 // -1 where the file system has no limit
	readOnly    bool
	nameless    error         // what became of an O_TMPFILE file
	fsync       time.Duration // p50 of small appends
	fsyncErr    error
}

// slowFsync is the latency above which the cluster's store and the node's journal hold everything up.
const slowFsync = 10 * time.Millisecond

// fileSystems names the common ones by their magic number.
//
//nolint:gochecknoglobals // a constant table
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC:      "ext4",
	unix.XFS_SUPER_MAGIC:       "xfs",
	unix.BTRFS_SUPER_MAGIC:     "btrfs",
	unix.TMPFS_MAGIC:           "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	unix.NFS_SUPER_MAGIC:       "nfs",
	unix.F2FS_SUPER_MAGIC:      "f2fs",
	unix.FUSE_SUPER_MAGIC:      "fuse",
	unix.CEPH_SUPER_MAGIC:      "ceph",
	unix.V9FS_MAGIC:            "9p",
	unix.SMB2_SUPER_MAGIC:      "smb",
	0x2fc12fc1:                 "zfs",
	0xca451a4e:                 "bcachefs",
}

func checkDisk(ctx context.Context, s Settings) []Finding {
	if s.DataDir == "" {
		return nil
	}
	return judgeDisk(s.DataDir, gatherDisk(ctx, s.DataDir))
}

func gatherDisk(ctx context.Context, dataDir string) diskFacts {
	dir, err := nearestDir(dataDir)
	f := diskFacts{dir: dir, err: err}
	if err != nil {
		return f
	}
	var st unix.Statfs_t
	if f.err = unix.Statfs(dir, &st); f.err != nil {
		return f
	}
	f.kind = fileSystems[int64(st.Type)] //nolint:unconvert // 32 bits wide on some architectures
	if f.kind == "" {
		f.kind = fmt.Sprintf("type %#x", st.Type)
	}
	f.free, f.total = int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize //nolint:gosec // sizes of real disks
	f.freeInodes = -1
	if st.Files > 0 {
		f.freeInodes = int64(st.Ffree) //nolint:gosec // a count of files
	}
	f.readOnly = st.Flags&unix.ST_RDONLY != 0
	work, err := os.MkdirTemp(dir, ".cloister-preflight-")
	if f.err = err; err != nil {
		return f
	}
	defer func() { _ = os.RemoveAll(work) }()
	f.nameless = tryNameless(work)
	f.fsync, f.fsyncErr = measureFsync(ctx, work)
	return f
}

// nearestDir returns the path, or the first of its parents that exists.
func nearestDir(path string) (string, error) {
	for {
		info, err := os.Stat(path)
		switch {
		case err == nil && !info.IsDir():
			return path, fmt.Errorf("%s is no directory", path)
		case err == nil:
			return path, nil
		case !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path):
			return path, err
		}
		path = filepath.Dir(path)
	}
}

func tryNameless(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// measureFsync returns the median of 20 appends of 4 KiB that reach the disk.
func measureFsync(ctx context.Context, dir string) (median time.Duration, err error) {
	const writes = 20
	f, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // our own directory
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var took []time.Duration
	for range writes {
		if err := ctx.Err(); err != nil {
			break // a median of fewer is good enough
		}
		start := time.Now()
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(start))
	}
	if len(took) == 0 {
		return 0, ctx.Err()
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

func judgeDisk(dataDir string, f diskFacts) []Finding {
	switch {
	case f.readOnly:
		return []Finding{fail("disk", fmt.Sprintf("%s, for %s, is mounted read-only", f.dir, dataDir), "choose another data directory with --data-dir, or remount it writable")}
	case f.err != nil:
		return []Finding{fail("disk", fmt.Sprintf("%s cannot be used: %v", dataDir, f.err), "choose another data directory with --data-dir, or make this one writable")}
	}
	return []Finding{judgeSpace(dataDir, f), judgeFileSystem(dataDir, f), judgeFsync(dataDir, f)}
}

func judgeSpace(dataDir string, f diskFacts) Finding {
	const check = "disk space"
	detail := fmt.Sprintf("%s free of %s for %s", size(f.free), size(f.total), dataDir)
	remedy := "free space there, or choose a larger disk with --data-dir"
	switch {
	case f.free < 3<<30:
		return fail(check, detail, remedy+": the base template alone needs 2 GiB while it is built")
	case f.freeInodes >= 0 && f.freeInodes < 10_000:
		return fail(check, fmt.Sprintf("%s, but only %d more files", detail, f.freeInodes), remedy)
	case f.free < 10<<30:
		return warn(check, detail, remedy)
	}
	return ok(check, detail)
}

func judgeFileSystem(dataDir string, f diskFacts) Finding {
	const check = "file system"
	switch {
	case f.nameless != nil:
		return fail(check, fmt.Sprintf("%s on %s has no nameless files (O_TMPFILE: %v)", f.kind, f.dir, f.nameless), "put "+dataDir+" on ext4, XFS or btrfs: --data-dir")
	case f.kind == "tmpfs":
		return warn(check, f.dir+" is in memory: sandboxes' disks use it up, and a restart of the machine loses everything", "put "+dataDir+" on a disk: --data-dir")
	case slices.Contains([]string{"nfs", "smb", "9p", "ceph"}, f.kind):
		return fail(check, fmt.Sprintf("%s is on a network file system (%s), where databases lose data", f.dir, f.kind), "put "+dataDir+" on a local disk: --data-dir")
	case f.kind == "overlay":
		return warn(check, f.dir+" is a container's own layer: slow, and gone with the container", "mount a volume at "+dataDir)
	}
	return ok(check, f.kind)
}

func judgeFsync(dataDir string, f diskFacts) Finding {
	const check = "disk latency"
	switch {
	case f.fsyncErr != nil:
		return fail(check, fmt.Sprintf("writing and syncing a file in %s: %v", f.dir, f.fsyncErr), "check the disk, or choose another one with --data-dir")
	case f.fsync > slowFsync:
		return warn(check, fmt.Sprintf("a write takes %s to reach the disk (p50)", f.fsync.Round(100*time.Microsecond)), "put "+dataDir+" on an SSD or NVMe disk: records wait for it")
	}
	return ok(check, fmt.Sprintf("a write reaches the disk in %s (p50)", f.fsync.Round(10*time.Microsecond)))
}
