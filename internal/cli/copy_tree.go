package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

// maxDepth is how many levels one listing of a sandbox's directory spans; what lies deeper is listed by itself.
const maxDepth = 64

// The permissions that new files and directories in a sandbox have.
const (
	newFileMode = 0o644
	newDirMode  = 0o755
)

// modes are the paths in a sandbox that need other permissions than new ones have.
type modes map[fs.FileMode][]string

func (m *modes) add(remote string, mode, fresh fs.FileMode) {
	if mode = mode.Perm(); mode == fresh {
		return
	}
	if *m == nil {
		*m = modes{}
	}
	(*m)[mode] = append((*m)[mode], remote)
}

// copyTreeIn copies the directory local so that it becomes remote.
func (c *copier) copyTreeIn(ctx context.Context, local, remote string) error {
	var modes modes
	err := filepath.WalkDir(local, func(at string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(local, at)
		if err != nil {
			return err
		}
		target := path.Join(remote, filepath.ToSlash(rel))
		switch {
		case d.IsDir():
			return c.makeDirIn(ctx, d, target, &modes)
		case d.Type().IsRegular():
			return c.copyFileIn(ctx, at, target, &modes)
		}
		c.skipped++
		return nil
	})
	if err != nil {
		return err
	}
	return c.guest.apply(ctx, modes)
}

// makeDirIn makes a directory like d; one that is there keeps its permissions.
func (c *copier) makeDirIn(ctx context.Context, d fs.DirEntry, remote string, modes *modes) error {
	if remote == "" || c.guest.isDir(ctx, remote) { // empty is the user's home
		return nil
	}
	at, err := c.guest.makeDir(ctx, remote)
	if err != nil {
		return err
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	modes.add(at, info.Mode(), newDirMode)
	return nil
}

func (c *copier) copyFileIn(ctx context.Context, local, remote string, modes *modes) error {
	f, err := os.Open(local) //nolint:gosec // the user names the file
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	length := int64(-1)
	if info.Mode().IsRegular() {
		length = info.Size()
	}
	at, err := c.guest.upload(ctx, remote, f, length)
	if err != nil {
		return err
	}
	modes.add(at, info.Mode(), newFileMode)
	return nil
}

// apply sets permissions, those of the innermost first, with as few commands as their lengths allow.
func (g *guestConn) apply(ctx context.Context, m modes) error {
	const most = 200
	for mode, paths := range m {
		slices.Reverse(paths)
		for some := range slices.Chunk(paths, most) {
			args := append([]string{strconv.FormatUint(uint64(mode), 8), "--"}, some...)
			if err := g.command(ctx, "chmod", args...); err != nil {
				return fmt.Errorf("everything was copied, but its permissions could not be set: %w", err)
			}
		}
	}
	return nil
}

// copyTreeOut copies the directory remote so that it becomes local, with mode where it is new. Names come from the sandbox: none may lead out of local.
func (c *copier) copyTreeOut(ctx context.Context, remote, local string, mode fs.FileMode) error {
	dirs := map[string]fs.FileMode{}
	if _, err := os.Stat(local); errors.Is(err, fs.ErrNotExist) {
		dirs["."] = mode
	}
	if err := os.MkdirAll(local, newDirMode); err != nil {
		return err
	}
	root, err := os.OpenRoot(local)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // only names were looked up
	for waiting := []string{"."}; len(waiting) > 0; waiting = waiting[1:] {
		deeper, err := c.copyLevels(ctx, root, remote, waiting[0], dirs)
		if err != nil {
			return err
		}
		waiting = append(waiting, deeper...)
	}
	var failed []error
	// At last, so that one that nobody may write to could be filled, and the innermost first.
	for _, rel := range slices.Backward(slices.Sorted(maps.Keys(dirs))) {
		failed = append(failed, root.Chmod(rel, dirs[rel]))
	}
	return errors.Join(failed...)
}

// copyLevels copies what lies below a directory of the tree, and returns the directories too deep for one listing.
func (c *copier) copyLevels(ctx context.Context, root *os.Root, remote, below string, dirs map[string]fs.FileMode) (deeper []string, err error) {
	top, entries, err := c.guest.list(ctx, path.Join(remote, below), maxDepth)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		rel, err := filepath.Rel(top, e.GetPath())
		if err != nil || !filepath.IsLocal(rel) || rel == "." {
			return nil, fmt.Errorf("the sandbox names %q, which is not below %q", e.GetPath(), top)
		}
		here := filepath.Join(below, rel)
		if depth(rel) == maxDepth && isDir(e) {
			deeper = append(deeper, here)
		}
		if err := c.copyEntry(ctx, root, e, here, dirs); err != nil {
			return nil, err
		}
	}
	return deeper, nil
}

func depth(rel string) int {
	n := 1
	for _, r := range rel {
		if r == filepath.Separator {
			n++
		}
	}
	return n
}

func (c *copier) copyEntry(ctx context.Context, root *os.Root, e *filesystem.EntryInfo, rel string, dirs map[string]fs.FileMode) error {
	switch e.GetType() {
	case filesystem.FileType_FILE_TYPE_DIRECTORY:
		dirs[rel] = perm(e)
		return root.MkdirAll(rel, 0o700)
	case filesystem.FileType_FILE_TYPE_FILE:
		return c.copyFileInto(ctx, root, e, rel)
	case filesystem.FileType_FILE_TYPE_SYMLINK, filesystem.FileType_FILE_TYPE_UNSPECIFIED:
	}
	c.skipped++
	return nil
}

func (c *copier) copyFileInto(ctx context.Context, root *os.Root, e *filesystem.EntryInfo, rel string) (err error) {
	if err := root.MkdirAll(filepath.Dir(rel), 0o755); err != nil {
		return err
	}
	var f *os.File
	defer func() {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	return c.guest.download(ctx, e.GetPath(), func() (io.Writer, error) {
		f, err = root.OpenFile(rel, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm(e))
		return f, err
	})
}
