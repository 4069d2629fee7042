package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	// reserved names are the bookkeeping of aufs.
	reserved = ".wh..wh."
)

// keeper takes the contents of files.
type keeper interface {
	Add(r io.Reader, size int64) (Content, error)
}

// ApplyLayer puts a layer, an uncompressed tar stream, on top of the tree. Contents go to the spool.
func (t *Tree) ApplyLayer(ctx context.Context, r io.Reader, spool *Spool) error {
	return t.apply(ctx, r, spool)
}

// ApplyFile is ApplyLayer of a file, in which the contents stay: it must not be closed as long as they are needed. Sparse
// entries are read as if they were not.
func (t *Tree) ApplyFile(ctx context.Context, f *os.File) error {
	in := &inPlace{file: f}
	return t.apply(ctx, in, in)
}

// inPlace reads an archive and leaves contents where they are.
type inPlace struct {
	file *os.File
	at   int64
}

func (p *inPlace) Read(b []byte) (int, error) {
	n, err := p.file.ReadAt(b, p.at)
	p.at += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// Seek lets the tar reader skip contents.
func (p *inPlace) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += p.at
	case io.SeekEnd:
		info, err := p.file.Stat()
		if err != nil {
			return 0, err
		}
		off += info.Size()
	}
	if off < 0 {
		return 0, fs.ErrInvalid
	}
	p.at = off
	return off, nil
}

// Add returns the contents that begin here.
func (p *inPlace) Add(_ io.Reader, size int64) (Content, error) {
	if size == 0 {
		return nil, nil //nolint:nilnil // no content is what an empty file has
	}
	return Extent{File: p.file, Off: p.at, Bytes: size}, nil
}

func (t *Tree) apply(ctx context.Context, r io.Reader, spool keeper) error {
	t.layer++
	for tr := tar.NewReader(r); ; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return invalidTar(err)
		}
		if err := t.applyEntry(hdr, tr, spool); err != nil {
			return fmt.Errorf("layer entry %.256q: %w", hdr.Name, err)
		}
	}
}

// invalidTar gives errors of the tar format their kind.
func invalidTar(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return sandbox.Invalidf("the layer is not a whole tar archive: %v", err)
	}
	return fmt.Errorf("read the layer: %w", err)
}

func (t *Tree) applyEntry(hdr *tar.Header, body io.Reader, spool keeper) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if slices.Contains(strings.Split(hdr.Name, "/"), "..") {
		return sandbox.Invalidf("the name contains \"..\"")
	}
	dir, base := path.Split(path.Clean("/" + hdr.Name))
	switch {
	case base == "":
		return t.applyRoot(hdr)
	case strings.Contains(dir, "/"+whiteout):
		return nil // below the bookkeeping of aufs
	}
	parent, err := t.parent(dir)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteout) {
		return t.applyWhiteout(parent, base)
	}
	at, err := t.entryPlace(parent, base)
	if err != nil {
		return err
	}
	n, err := t.entryNode(hdr, body, spool)
	if err != nil {
		return err
	}
	t.dropped += countXattrs(hdr)
	if old := at.node; old != nil && old.IsDir() && n.IsDir() {
		n.children = old.children
	}
	return t.set(parent, base, n)
}

func (t *Tree) entryPlace(parent *Node, base string) (place, error) {
	if len(base) > maxName || strings.IndexByte(base, 0) >= 0 {
		return place{}, sandbox.Invalidf("the name's last part has %d bytes or a zero byte; at most %d bytes are allowed",
			len(base), maxName)
	}
	return place{dir: parent, name: base, node: parent.Child(base)}, nil
}

// parent returns the directory, made where it is missing, that the path leads to.
func (t *Tree) parent(dir string) (*Node, error) {
	n, _, err := t.Mkdir(dir, Attr{Perm: 0o755})
	return n, err
}

func (t *Tree) applyRoot(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return sandbox.Invalidf("the root is not a directory")
	}
	n, err := headerNode(hdr, unix.S_IFDIR)
	if err != nil {
		return err
	}
	n.children = t.Root.children
	*t.Root = *n
	return nil
}

// applyWhiteout hides what earlier layers put there; what this layer adds stays, whichever comes first.
func (t *Tree) applyWhiteout(parent *Node, base string) error {
	switch {
	case base == opaque:
		for name := range parent.children {
			t.hide(parent, name)
		}
	case strings.HasPrefix(base, reserved):
	case base == whiteout || base == whiteout+"." || base == whiteout+"..":
		return sandbox.Invalidf("the whiteout names nothing")
	default:
		t.hide(parent, strings.TrimPrefix(base, whiteout))
	}
	return nil
}

func (t *Tree) hide(parent *Node, name string) {
	e, ok := parent.children[name]
	if !ok {
		return
	}
	if e.node.IsDir() {
		for below := range e.node.children {
			t.hide(e.node, below)
		}
		if len(e.node.children) > 0 {
			return
		}
	}
	if e.layer < t.layer {
		delete(parent.children, name)
	}
}

// entryNode makes the node of a tar entry, or finds that of a hard link.
func (t *Tree) entryNode(hdr *tar.Header, body io.Reader, spool keeper) (*Node, error) {
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return t.regular(hdr, body, spool)
	case tar.TypeLink:
		return t.hardLink(hdr.Linkname)
	case tar.TypeSymlink:
		n, err := headerNode(hdr, unix.S_IFLNK)
		if err != nil {
			return nil, err
		}
		n.Mode |= 0o777
		n.Target = hdr.Linkname
		return n, checkTarget(n.Target)
	case tar.TypeDir:
		return headerNode(hdr, unix.S_IFDIR)
	case tar.TypeFifo:
		return headerNode(hdr, unix.S_IFIFO)
	case tar.TypeChar:
		return deviceNode(hdr, unix.S_IFCHR)
	case tar.TypeBlock:
		return deviceNode(hdr, unix.S_IFBLK)
	default:
		return nil, sandbox.Invalidf("unknown entry type %q", hdr.Typeflag)
	}
}

func (t *Tree) regular(hdr *tar.Header, body io.Reader, spool keeper) (*Node, error) {
	n, err := headerNode(hdr, unix.S_IFREG)
	if err != nil {
		return nil, err
	}
	if err := t.charge(hdr.Size); err != nil {
		return nil, err
	}
	if n.Content, err = spool.Add(body, hdr.Size); err != nil {
		return nil, invalidTar(err)
	}
	return n, nil
}

func (t *Tree) hardLink(name string) (*Node, error) {
	at, err := t.locate(name, false, false)
	if err != nil {
		return nil, fmt.Errorf("hard link: %w", err)
	}
	if at.node == nil {
		return nil, sandbox.Invalidf("hard link to %.256q, which does not exist", name)
	}
	if at.node.IsDir() {
		return nil, sandbox.Invalidf("hard link to %.256q, which is a directory", name)
	}
	return at.node, nil
}

func headerNode(hdr *tar.Header, kind uint32) (*Node, error) {
	for _, id := range []int{hdr.Uid, hdr.Gid} {
		if id < 0 || id >= math.MaxUint32 {
			return nil, sandbox.Invalidf("owner %d is outside 0 to %d", id, uint32(math.MaxUint32-1))
		}
	}
	return &Node{
		Mode: kind | uint32(hdr.Mode&0o7777),
		UID:  uint32(hdr.Uid), //nolint:gosec // checked above
		GID:  uint32(hdr.Gid), //nolint:gosec // checked above
		Sec:  hdr.ModTime.Unix(),
		Nsec: uint32(hdr.ModTime.Nanosecond()), //nolint:gosec // below 1e9
	}, nil
}

func deviceNode(hdr *tar.Header, kind uint32) (*Node, error) {
	if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
		return nil, sandbox.Invalidf("device number %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
	}
	n, err := headerNode(hdr, kind)
	if err != nil {
		return nil, err
	}
	n.Rdev = Device(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	return n, nil
}

func checkTarget(target string) error {
	if target == "" || len(target) > maxTarget || strings.IndexByte(target, 0) >= 0 {
		return sandbox.Invalidf("symbolic link target of %d bytes; 1 to %d without zero bytes are allowed", len(target), maxTarget)
	}
	return nil
}

func countXattrs(hdr *tar.Header) int {
	count := 0
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "SCHILY.xattr.") {
			count++
		}
	}
	return count
}
