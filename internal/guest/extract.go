package guest

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"syscall"
	"time"
)

// extractor writes entries of an archive below one directory, which it cannot leave: links that lead out of it are made,
// but not followed.
type extractor struct {
	*copyRequest
	archive *tar.Reader
	buf     []byte

	root *os.Root // opened when the first entry tells a file from a directory
	file string   // below root, where the source is a single file
	// implied is the directories that were made for what is in them, whose own entries may follow.
	implied map[string]bool
}

func (x *extractor) close() error {
	if x.root == nil {
		return nil
	}
	return x.root.Close()
}

func (x *extractor) entry(h *tar.Header) error {
	name, err := entryName(h.Name)
	if err != nil {
		return httpErrorf(http.StatusBadRequest, "%v", err)
	}
	rel, ok := x.source.relative(name)
	if !ok {
		return nil
	}
	if err := x.open(rel == "" && h.Typeflag != tar.TypeDir); err != nil {
		return err
	}
	if rel == "" {
		rel = x.file // "" for a directory, whose place exists
	}
	if rel == "" {
		return nil
	}
	err = x.write(rel, h)
	if err != nil {
		return fmt.Errorf("copy '%s': %w", name, err)
	}
	return nil
}

// open opens the directory that the entries go into.
func (x *extractor) open(single bool) error {
	if x.root != nil {
		if single {
			return httpErrorf(http.StatusBadRequest, "'%s' is in the archive more than once", x.source.base)
		}
		return nil
	}
	dir := x.dest
	if single {
		info, err := os.Stat(x.dest)
		if x.dir || err == nil && info.IsDir() {
			x.file = path.Base(x.source.base)
		} else {
			dir, x.file = filepath.Dir(x.dest), filepath.Base(x.dest)
		}
	}
	err := makeDirs(dir, &account{uid: uint32(x.uid), gid: uint32(x.gid)}) //nolint:gosec // Ids of 31 bits.
	if err != nil {
		return fmt.Errorf("make the destination: %w", err)
	}
	x.root, err = os.OpenRoot(dir)
	return err
}

func (x *extractor) write(rel string, h *tar.Header) error {
	if parent := path.Dir(rel); parent != "." {
		if err := x.parents(parent); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return x.writeDir(rel, h)
	case tar.TypeReg:
		return x.writeFile(rel, h)
	case tar.TypeSymlink:
		if err := x.makeWay(rel); err != nil {
			return err
		}
		if err := x.root.Symlink(h.Linkname, rel); err != nil {
			return err
		}
		return x.own(rel)
	case tar.TypeLink:
		return x.writeLink(rel, h)
	}
	return httpErrorf(http.StatusBadRequest, "an entry of type %q: only files, directories and links can be copied", h.Typeflag)
}

// parents makes the directories above an entry.
func (x *extractor) parents(dir string) error {
	info, err := x.root.Stat(dir)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return &fs.PathError{Op: "mkdir", Path: dir, Err: syscall.ENOTDIR}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if above := path.Dir(dir); above != "." {
		if err := x.parents(above); err != nil {
			return err
		}
	}
	if err := x.root.Mkdir(dir, 0o755); err != nil {
		return err
	}
	x.implied[dir] = true
	return x.own(dir)
}

// writeDir makes a directory. One that was there before the copy keeps what it is.
func (x *extractor) writeDir(rel string, h *tar.Header) error {
	if !x.implied[rel] {
		err := x.root.Mkdir(rel, 0o755)
		if errors.Is(err, fs.ErrExist) {
			info, statErr := x.root.Stat(rel)
			if statErr == nil && !info.IsDir() {
				return &fs.PathError{Op: "mkdir", Path: rel, Err: syscall.ENOTDIR}
			}
			return statErr
		}
		if err != nil {
			return err
		}
	}
	delete(x.implied, rel)
	if err := x.own(rel); err != nil {
		return err
	}
	return x.root.Chmod(rel, x.perm(h))
}

// writeFile replaces what is there, so that other names of it and those who have it open are left alone.
func (x *extractor) writeFile(rel string, h *tar.Header) error {
	if err := x.makeWay(rel); err != nil {
		return err
	}
	f, err := x.root.OpenFile(rel, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = copyThrough(f, x.archive, x.buf)
	if err == nil && os.Getuid() == 0 {
		err = f.Chown(x.uid, x.gid)
	}
	if err == nil {
		err = f.Chmod(x.perm(h)) // after the owner, whose change takes the set-id bits away
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if broken := (*brokenBodyError)(nil); errors.As(err, &broken) {
		return httpErrorf(http.StatusBadRequest, "the archive is damaged: %v", broken)
	}
	if err != nil {
		return err
	}
	return x.root.Chtimes(rel, time.Time{}, h.ModTime)
}

// writeLink gives a file that was copied before another name.
func (x *extractor) writeLink(rel string, h *tar.Header) error {
	target, err := entryName(h.Linkname)
	if err != nil {
		return httpErrorf(http.StatusBadRequest, "%v", err)
	}
	old, ok := x.source.relative(target)
	if !ok || old == "" {
		return httpErrorf(http.StatusBadRequest, "a hard link to '%s', which is not copied", target)
	}
	if old == rel {
		return nil
	}
	if err := x.makeWay(rel); err != nil {
		return err
	}
	return x.root.Link(old, rel)
}

// makeWay removes what a file or link is to replace. A directory stays.
func (x *extractor) makeWay(rel string) error {
	info, err := x.root.Lstat(rel)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return &fs.PathError{Op: "replace", Path: rel, Err: syscall.EISDIR}
	}
	return x.root.Remove(rel)
}

func (x *extractor) own(rel string) error {
	if os.Getuid() != 0 {
		return nil
	}
	return x.root.Lchown(rel, x.uid, x.gid)
}

// perm returns the mode of a file or directory, set-id and sticky bits included.
func (x *extractor) perm(h *tar.Header) fs.FileMode {
	bits := h.Mode & 0o7777
	if x.mode >= 0 {
		bits = x.mode
	}
	mode := fs.FileMode(bits & 0o777)
	for bit, flag := range map[int64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if bits&bit != 0 {
			mode |= flag
		}
	}
	return mode
}
