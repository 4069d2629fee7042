package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// storage is where the node keeps its files: the directory node of the data directory, or an XFS file system that is
// mounted there and whose disk is the file storage.img beside it. All of node is in it, not only what shares extents, so
// that the journal and what it speaks of are lost or kept together.
//
// The mount belongs to the machine, not to the process: sandboxes write to it while no daemon runs. A start finds it, or
// makes it again after a restart of the machine; Purge takes it away. The loop device is detached by the kernel with the
// last mount, so that no end of this process, however sudden, leaves one behind.
type storage struct {
	// image is the file, node the directory; both are absolute and without symbolic links.
	image, node string
	// size is how large the file system should be in bytes; 0 leaves that to what is there.
	size int64
	log  *slog.Logger
}

// leastImage is the size below which mkfs.xfs refuses, with some room, in bytes.
const leastImage = 512 << 20

func storageOf(cfg *config.Config, log *slog.Logger) (storage, error) {
	dir, err := filepath.EvalSymlinks(cfg.DataDir)
	if err != nil {
		return storage{}, fmt.Errorf("find data directory: %w", err)
	}
	return storage{
		image: filepath.Join(dir, imageFile), node: filepath.Join(dir, "node"), size: int64(cfg.StorageSize), log: log,
	}, nil
}

// imageFile is the name of the image in the data directory.
const imageFile = "storage.img"

// openStorage makes the node's directory ready to be used, as the settings want it.
func (d *daemon) openStorage(ctx context.Context) error {
	s, err := storageOf(d.cfg, d.log)
	if err != nil {
		return err
	}
	has, err := s.look()
	if err != nil {
		return err
	}
	wanted, err := chooseStorage(d.cfg.Storage, d.cfg.DataDir, has)
	if err != nil || !wanted {
		return err
	}
	if has.image {
		return s.open(ctx)
	}
	d.notify(Event{Step: "making the storage image"})
	if err := s.create(ctx); err != nil {
		return fmt.Errorf("make %s: %w", s.image, err)
	}
	if err := s.open(ctx); err != nil {
		return errors.Join(err, os.Remove(s.image))
	}
	return nil
}

// found is what a data directory holds.
type found struct {
	// image and mounted say whether there is an image, and whether it is mounted; plain, whether the node's directory
	// holds files that are not in the image.
	image, mounted, plain bool
}

func (s storage) look() (found, error) {
	var has found
	_, err := os.Stat(s.image)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return found{}, fmt.Errorf("look for %s: %w", s.image, err)
	}
	has.image = err == nil
	if has.image {
		if has.mounted, err = s.mounted(); err != nil {
			return found{}, err
		}
	}
	if !has.mounted {
		entries, err := os.ReadDir(s.node)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return found{}, fmt.Errorf("read %s: %w", s.node, err)
		}
		has.plain = len(entries) > 0
	}
	return has, nil
}

// chooseStorage decides whether the image is used. Errors: ErrConflict when what the directory holds does not allow it.
func chooseStorage(setting, dir string, has found) (image bool, err error) {
	again := fmt.Sprintf("choose another --data-dir, or remove everything that is there with `cloister down --purge --data-dir %s`", dir)
	switch {
	case has.image && has.plain:
		return false, sandbox.Conflictf("data directory %s holds %s and, beside it, files in node that the image would hide: move one of them away", dir, imageFile)
	case setting == config.StorageDir && has.image:
		return false, sandbox.Conflictf("storage %q: the sandboxes and templates of data directory %s are in its %s: leave the setting out, %s", setting, dir, imageFile, again)
	case setting == config.StorageImage && has.plain:
		return false, sandbox.Conflictf("storage %q: data directory %s already keeps its sandboxes and templates in a plain directory: leave the setting out, %s", setting, dir, again)
	}
	return has.image || setting == config.StorageImage, nil
}

// imageWanted reports whether a start with these settings would use an image.
func imageWanted(cfg *config.Config) bool {
	return cfg.Storage == config.StorageImage || imageIn(cfg.DataDir)
}

func imageIn(dataDir string) bool {
	_, err := os.Stat(filepath.Join(dataDir, imageFile)) //nolint:gosec // the operator names the directory
	return err == nil
}

// create makes the image. It has its name only once it is whole.
func (s storage) create(ctx context.Context) (err error) {
	size := s.size
	if size == 0 {
		size, err = defaultImage(filepath.Dir(s.image))
	} else {
		err = s.hasRoom(size)
	}
	if err != nil {
		return err
	}
	mkfs, err := exec.LookPath("mkfs.xfs")
	if err != nil {
		return sandbox.Unsupportedf("mkfs.xfs is not installed: `apt-get install -y xfsprogs` (or your distribution's package xfsprogs)")
	}
	half := s.image + ".new"
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(half)
		}
	}()
	if err := makeSparse(half, size); err != nil {
		return err
	}
	// The sector is the loop device's block: smaller ones would be read before they are written.
	if err := runTool(ctx, mkfs, "-q", "-m", "reflink=1", "-s", fmt.Sprintf("size=%d", loopBlock), half); err != nil {
		return err
	}
	if err := os.Rename(half, s.image); err != nil {
		return err
	}
	s.log.InfoContext(ctx, "storage image made", slog.String("path", s.image), slog.Int64("bytes", size))
	return syncDir(filepath.Dir(s.image))
}

// defaultImage returns four fifths of what is free in dir, in whole GiB where that is more than one.
func defaultImage(dir string) (int64, error) {
	free, err := freeBytes(dir)
	if err != nil {
		return 0, err
	}
	size := free / 5 * 4
	if size > 1<<30 {
		size -= size % (1 << 30)
	}
	if size < leastImage {
		return 0, sandbox.Exhaustedf("%d MiB are free in %s: an image needs at least %d MiB", free>>20, dir, int64(leastImage)>>20*5/4)
	}
	return size, nil
}

// hasRoom checks that the disk has the bytes that the image may come to take. Beyond them guests would lose what they wrote:
// the image's file system takes it, and finds no place for it later. Errors: ErrExhausted.
func (s storage) hasRoom(more int64) error {
	free, err := freeBytes(filepath.Dir(s.image))
	if err != nil {
		return err
	}
	if more > free {
		size, room := config.Size(s.size), config.Size(free)
		return sandbox.Exhaustedf("storage-size %s: only %s more are free in %s: give less, or leave the setting out", size.String(), room.String(), filepath.Dir(s.image))
	}
	return nil
}

func makeSparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // in our own directory
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func syncDir(path string) error {
	f, err := os.Open(path) //nolint:gosec // our own directory
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// toolTimeout bounds a run of an XFS program.
const toolTimeout = 2 * time.Minute

// runTool runs a program; its error carries what the program said.
func runTool(ctx context.Context, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, toolTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput() //nolint:gosec // xfsprogs, with paths of ours
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(name), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// open mounts the image unless it is mounted, and lets it grow to the size that the settings want. A failure leaves nothing
// mounted that was not before.
func (s storage) open(ctx context.Context) error {
	if err := os.MkdirAll(s.node, 0o700); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := s.enlarge(); err != nil {
		return err
	}
	mounted, err := s.mounted()
	if err != nil {
		return err
	}
	if mounted {
		return s.grow(ctx)
	}
	if err := s.mount(ctx); err != nil {
		return err
	}
	if err := s.grow(ctx); err != nil {
		return errors.Join(err, s.close(context.WithoutCancel(ctx)))
	}
	s.log.InfoContext(ctx, "storage image mounted", slog.String("path", s.image))
	return nil
}

// enlarge makes the file as long as the setting says. Errors: ErrInvalid when it is longer.
func (s storage) enlarge() error {
	var st unix.Stat_t
	if err := unix.Stat(s.image, &st); err != nil {
		return fmt.Errorf("look at the storage image: %w", err)
	}
	switch {
	case s.size == 0 || st.Size == s.size:
		return nil
	case st.Size > s.size:
		is, want := config.Size(st.Size), config.Size(s.size)
		return sandbox.Invalidf("storage-size %s: %s has %s and cannot shrink: leave the setting out, or give at least that", want.String(), s.image, is.String())
	}
	if err := s.hasRoom(s.size - st.Blocks*512); err != nil {
		return err
	}
	if err := os.Truncate(s.image, s.size); err != nil {
		return fmt.Errorf("grow the storage image: %w", err)
	}
	return nil
}

// grow lets the mounted file system fill its file; where it already does, nothing happens. An earlier start may have been
// killed between any two of the steps.
func (s storage) grow(ctx context.Context) error {
	if s.size == 0 {
		return nil
	}
	tool, err := exec.LookPath("xfs_growfs")
	if err != nil {
		return sandbox.Unsupportedf("storage-size is set, but xfs_growfs is not installed: `apt-get install -y xfsprogs`, or leave the setting out")
	}
	if err := s.tellSize(); err != nil {
		return err
	}
	return runTool(ctx, tool, "-d", s.node)
}

// mount attaches the image to a loop device, unless another mount namespace has it attached, and mounts it.
func (s storage) mount(ctx context.Context) error {
	dev, err := attached(s.image)
	if err == nil && dev == nil {
		dev, err = attach(ctx, s.image)
	}
	if err != nil {
		return err
	}
	defer func() { _ = dev.Close() }() // the mount holds it from here on
	// discard gives the host back what is deleted; it costs nothing that could be measured.
	err = unix.Mount(dev.Name(), s.node, "xfs", unix.MS_NOATIME, "discard")
	switch {
	case errors.Is(err, unix.ENODEV):
		return sandbox.Unsupportedf("this kernel has no XFS: load the module xfs, or use --storage dir")
	case errors.Is(err, unix.EPERM):
		return sandbox.Deniedf("mount %s: %v: in a container, give it the capability SYS_ADMIN, or use --storage dir", dev.Name(), err)
	case err != nil:
		return fmt.Errorf("mount %s at %s: %w", dev.Name(), s.node, err)
	}
	// Where the parent is shared, copies of the mount in other namespaces would keep it alive after Purge.
	if err := unix.Mount("", s.node, "", unix.MS_PRIVATE, ""); err != nil {
		return errors.Join(fmt.Errorf("make the mount of %s private: %w", s.node, err), unix.Unmount(s.node, unix.MNT_DETACH))
	}
	return os.Chmod(s.node, 0o700) //nolint:gosec // a directory
}

// unmountTime is how long the processes of ended sandboxes may hold the file system.
const unmountTime = 10 * time.Second

// close unmounts the image, which detaches its loop device.
func (s storage) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, unmountTime)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		mounted, err := s.mounted()
		if err != nil || !mounted {
			return err
		}
		err = unix.Unmount(s.node, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue // another mount may lie below
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unmount %s: %w", s.node, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("unmount %s: %w: something still uses files there; `fuser -vm %s` says what", s.node, err, s.node)
		}
	}
}

// purge unmounts and removes the image, with the half-made one of a killed start.
func (s storage) purge(ctx context.Context) error {
	if _, err := os.Stat(s.image); err == nil {
		if err := s.close(ctx); err != nil {
			return err
		}
	}
	for _, name := range []string{s.image, s.image + ".new"} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove storage image: %w", err)
		}
	}
	return nil
}

// openForPurge mounts what is to be removed: its journal says what else is. One that cannot be mounted is removed unread.
func (s storage) openForPurge(ctx context.Context) {
	has, err := s.look()
	if err == nil && has.image && !has.mounted && !has.plain {
		s.size = 0 // a wrong setting is no reason not to remove it
		err = s.open(ctx)
	}
	if err != nil {
		s.log.WarnContext(ctx, "storage image cannot be read and is removed as it is", slog.Any("err", err))
	}
}

// freeBytes returns what may still be written in a directory.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("read disk size of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:gosec // no disk has 2^63 bytes
}

// freeForNode returns what the node may still write, in bytes. A sparse image promises more than the disk below may have.
func freeForNode(dataDir string) (int64, error) {
	below, err := freeBytes(dataDir)
	if err != nil {
		return 0, err
	}
	in, err := freeBytes(filepath.Join(dataDir, "node"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return below, nil
	case err != nil:
		return 0, err
	}
	if imageIn(dataDir) {
		return min(in, below), nil
	}
	return in, nil // the directory itself, or a disk that somebody mounted there
}
