package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// inodeKey tells whether two names of a directory tree are the same file.
type inodeKey struct{ dev, ino uint64 }

// importer adds a directory of the machine to a tree.
type importer struct {
	tree  *Tree
	root  *os.Root
	dev   uint64
	links map[inodeKey]*Node
	// skipped are directories on other file systems.
	skipped []string
}

// AddDir puts what the directory holds into the tree. Contents are read through root later, which must stay open until
// then. It stays on one file system; directories where another one is mounted are added empty and returned.
func (t *Tree) AddDir(ctx context.Context, root *os.Root) (skipped []string, err error) {
	t.layer++
	info, err := root.Stat(".")
	if err != nil {
		return nil, fmt.Errorf("read directory: %w", err)
	}
	st, err := statOf(info)
	if err != nil {
		return nil, err
	}
	children := t.Root.children
	*t.Root = *statNode(st)
	t.Root.children = children
	im := &importer{tree: t, root: root, dev: st.Dev, links: map[inodeKey]*Node{}}
	err = im.dir(ctx, ".", t.Root)
	return im.skipped, err
}

func (im *importer) dir(ctx context.Context, name string, n *Node) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	names, err := im.list(name)
	if err != nil {
		return fmt.Errorf("read directory %s: %w", name, err)
	}
	for _, base := range names {
		if err := im.add(ctx, path.Join(name, base), base, n); err != nil {
			return err
		}
	}
	return nil
}

func (im *importer) list(name string) ([]string, error) {
	f, err := im.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	return names, errors.Join(err, f.Close())
}

func (im *importer) add(ctx context.Context, name, base string, dir *Node) error {
	info, err := im.root.Lstat(name)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	st, err := statOf(info)
	if err != nil {
		return err
	}
	key := inodeKey{st.Dev, st.Ino}
	if n := im.links[key]; n != nil {
		return im.tree.set(dir, base, n)
	}
	n := statNode(st)
	if err := im.fill(n, name, st); err != nil {
		return err
	}
	if st.Nlink > 1 && !n.IsDir() {
		im.links[key] = n
	}
	if err := im.tree.set(dir, base, n); err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	switch {
	case !n.IsDir():
		return nil
	case st.Dev != im.dev:
		im.skipped = append(im.skipped, name)
		return nil
	}
	return im.dir(ctx, name, n)
}

func (im *importer) fill(n *Node, name string, st *syscall.Stat_t) error {
	switch n.Type() {
	case unix.S_IFREG:
		if st.Size == 0 {
			return nil
		}
		n.Content = &diskFile{root: im.root, name: name, size: st.Size, key: inodeKey{st.Dev, st.Ino}}
		return im.tree.charge(st.Size)
	case unix.S_IFLNK:
		target, err := im.root.Readlink(name)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		n.Target = target
		return checkTarget(target)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = Device(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return nil
}

func statOf(info fs.FileInfo) (*syscall.Stat_t, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, sandbox.Unsupportedf("the system does not say who owns %s", info.Name())
	}
	return st, nil
}

func statNode(st *syscall.Stat_t) *Node {
	return &Node{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid,
		Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec), //nolint:gosec // below 1e9
	}
}

// diskFile is a Content that stays in the directory that it was found in.
type diskFile struct {
	root *os.Root
	name string
	size int64
	key  inodeKey
}

func (d *diskFile) Size() int64 { return d.size }

// Open refuses a file that is not the one that was found any more.
func (d *diskFile) Open() (io.ReadCloser, error) {
	f, err := d.root.OpenFile(d.name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	st, err := statOf(info)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if (inodeKey{st.Dev, st.Ino}) != d.key || st.Size != d.size {
		changed := sandbox.Conflictf("%s changed while it was read", d.name)
		return nil, errors.Join(changed, f.Close())
	}
	return f, nil
}
