package erofs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	windowSize = 256 << 10
	// maxWindows bounds the memory for what was read of the image, in windows.
	maxWindows = 64
	maxDepth   = 1024
	maxName    = 255
)

// blocks is the contents of a regular file in an image: they begin at a block's start, and their last block is filled up
// with zeros.
type blocks struct{ tree.Extent }

// imageReader turns an image back into a tree.
type imageReader struct {
	file *os.File
	size int64
	tree *tree.Tree
	// windows are parts of the image by their number.
	windows map[int64][]byte
	// nodes are those that were read, by their place.
	nodes map[uint64]*tree.Node
}

// Read reads an image that Write has written. Contents stay in the file, which must not be closed or changed as long as
// they are needed. Anything else than such an image is ErrInvalid, and so is one that breaks the limits.
func Read(ctx context.Context, f *os.File, limits tree.Limits) (*tree.Tree, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read an image: %w", err)
	}
	r := &imageReader{
		file: f, size: info.Size(), tree: tree.New(limits), windows: map[int64][]byte{}, nodes: map[uint64]*tree.Node{},
	}
	root, err := r.super()
	if err != nil {
		return nil, fmt.Errorf("read an image: %w", err)
	}
	n, rec, err := r.inode(root)
	switch {
	case err != nil:
		return nil, fmt.Errorf("read an image: %w", err)
	case !n.IsDir():
		return nil, sandbox.Invalidf("the image's root is not a directory")
	}
	r.tree.Root = n
	if err := r.dir(ctx, "/", n, rec); err != nil {
		return nil, fmt.Errorf("read an image: %w", err)
	}
	return r.tree, nil
}

// bytes returns n bytes of metadata, valid until the next call.
func (r *imageReader) bytes(off, n int64) ([]byte, error) {
	if off < 0 || n < 0 || n > windowSize || off > r.size-n {
		return nil, sandbox.Invalidf("the image refers to %d bytes at %d; it has %d", n, off, r.size)
	}
	first, err := r.window(off / windowSize)
	if err != nil {
		return nil, err
	}
	at := off % windowSize
	if at+n <= int64(len(first)) {
		return first[at : at+n], nil
	}
	next, err := r.window(off/windowSize + 1)
	if err != nil {
		return nil, err
	}
	joined := append([]byte(nil), first[at:]...)
	return append(joined, next[:n-int64(len(joined))]...), nil
}

func (r *imageReader) window(number int64) ([]byte, error) {
	if w := r.windows[number]; w != nil {
		return w, nil
	}
	if len(r.windows) >= maxWindows {
		clear(r.windows)
	}
	w := make([]byte, min(windowSize, r.size-number*windowSize))
	if _, err := r.file.ReadAt(w, number*windowSize); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	r.windows[number] = w
	return w, nil
}

// super checks the start of the image and returns the place of its root.
func (r *imageReader) super() (root uint64, err error) {
	b, err := r.bytes(0, min(blockSize, r.size))
	if err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	if len(b) < blockSize || le.Uint32(b[superStart:]) != magic {
		return 0, sandbox.Invalidf("the file is not an EROFS image")
	}
	head := append([]byte(nil), b...)
	clear(head[superStart+4 : superStart+8])
	checksum(head)
	switch sum := le.Uint32(b[superStart+4:]); {
	case sum != le.Uint32(head[superStart+4:]):
		return 0, sandbox.Invalidf("the image is damaged: its first block has another checksum than %#x", sum)
	case b[superStart+12] != blockBits, le.Uint32(b[superStart+8:]) != featureChecksum|featureMtime,
		le.Uint32(b[superStart+40:]) != 0, le.Uint32(b[superStart+80:]) != 0:
		return 0, sandbox.Invalidf("the EROFS image has features that the images of this program do not have")
	case int64(le.Uint32(b[superStart+36:]))<<blockBits != r.size:
		return 0, sandbox.Invalidf("the image should have %d blocks; its file has %d bytes", le.Uint32(b[superStart+36:]), r.size)
	}
	return uint64(le.Uint16(b[superStart+14:])), nil
}

// record is where an inode's data lies.
type record struct {
	size int64
	// blocks is where the blocks begin, tail where what follows the inode does; bytes of size%blockSize are there.
	blocks, tail int64
	inline       bool
}

// inode reads the inode at a place, or finds it.
func (r *imageReader) inode(nid uint64) (*tree.Node, record, error) {
	if nid > math.MaxInt64>>slotBits {
		return nil, record{}, sandbox.Invalidf("the image refers to inode %d", nid)
	}
	at := int64(nid) << slotBits
	b, err := r.bytes(at, inodeSize)
	if err != nil {
		return nil, record{}, err
	}
	le := binary.LittleEndian
	format, size := le.Uint16(b), le.Uint64(b[8:])
	if format != formatPlain && format != formatInline || le.Uint16(b[2:]) != 0 || size > math.MaxInt64 {
		return nil, record{}, sandbox.Invalidf("inode %d has format %#x, attributes or %d bytes; this program writes none such", nid, format, size)
	}
	n := &tree.Node{
		Mode: uint32(le.Uint16(b[4:])), UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]),
		Sec: int64(le.Uint64(b[32:])), Nsec: le.Uint32(b[40:]), //nolint:gosec // times before 1970 are kept this way
	}
	rec := record{
		size: int64(size), blocks: int64(le.Uint32(b[16:])) << blockBits, tail: at + inodeSize, inline: format == formatInline,
	}
	if n.Nsec >= 1e9 {
		return nil, record{}, sandbox.Invalidf("inode %d has a time with %d nanoseconds", nid, n.Nsec)
	}
	return n, rec, r.fill(n, rec, le.Uint32(b[16:]))
}

// fill reads what an inode has besides its attributes; union is its number of many meanings.
func (r *imageReader) fill(n *tree.Node, rec record, union uint32) error {
	switch n.Type() {
	case unix.S_IFREG:
		switch {
		case rec.inline:
			return sandbox.Invalidf("a regular file has its contents in its inode")
		case rec.size > r.size || rec.blocks > r.size-rec.size:
			return sandbox.Invalidf("a file of %d bytes at %d ends behind the image, which has %d", rec.size, rec.blocks, r.size)
		case rec.size > 0:
			n.Content = blocks{tree.Extent{File: r.file, Off: rec.blocks, Bytes: rec.size}}
		}
	case unix.S_IFLNK:
		if rec.size == 0 || rec.size > maxSymlinkTarget {
			return sandbox.Invalidf("a symbolic link has %d bytes; 1 to %d are allowed", rec.size, maxSymlinkTarget)
		}
		b, err := r.bytes(rec.at(0), rec.size)
		if err != nil {
			return err
		}
		if n.Target = string(b); strings.IndexByte(n.Target, 0) >= 0 {
			return sandbox.Invalidf("a symbolic link has a zero byte")
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = union
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return sandbox.Invalidf("an inode has mode %#o", n.Mode)
	}
	return nil
}

// at is where the data's block with that number lies.
func (rec record) at(number int64) int64 {
	if rec.inline && number == rec.size>>blockBits {
		return rec.tail
	}
	return rec.blocks + number<<blockBits
}

// dir reads a directory and all below it.
func (r *imageReader) dir(ctx context.Context, name string, n *tree.Node, rec record) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if strings.Count(name, "/") > maxDepth {
		return sandbox.Invalidf("the image has directories more than %d deep", maxDepth)
	}
	for number := int64(0); number<<blockBits < rec.size; number++ {
		b, err := r.bytes(rec.at(number), min(blockSize, rec.size-number<<blockBits))
		if err != nil {
			return err
		}
		entries, err := parseDirBlock(b)
		if err != nil {
			return fmt.Errorf("directory %.256q: %w", name, err)
		}
		for _, e := range entries {
			if err := r.add(ctx, name, n, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// dirent is a name of a directory.
type dirent struct {
	name string
	nid  uint64
}

// parseDirBlock reads a directory block.
func parseDirBlock(b []byte) ([]dirent, error) {
	le := binary.LittleEndian
	if len(b) < direntSize {
		return nil, sandbox.Invalidf("a block of %d bytes", len(b))
	}
	first := int(le.Uint16(b[8:]))
	if first < direntSize || first%direntSize != 0 || first > len(b) {
		return nil, sandbox.Invalidf("names begin at byte %d of a block of %d", first, len(b))
	}
	all := make([]dirent, 0, first/direntSize)
	for at := 0; at < first; at += direntSize {
		from, to := int(le.Uint16(b[at+8:])), len(b)
		if next := at + direntSize; next < first {
			to = int(le.Uint16(b[next+8:]))
		}
		if from < first || from > to || to > len(b) {
			return nil, sandbox.Invalidf("a name from byte %d to %d of a block of %d", from, to, len(b))
		}
		name := string(b[from:to])
		if at+direntSize == first {
			name, _, _ = strings.Cut(name, "\x00")
		}
		all = append(all, dirent{name: name, nid: le.Uint64(b[at:])})
	}
	return all, nil
}

// add puts one name of a directory into the tree.
func (r *imageReader) add(ctx context.Context, dir string, parent *tree.Node, e dirent) error {
	if e.name == "." || e.name == ".." {
		return nil
	}
	if e.name == "" || len(e.name) > maxName || strings.ContainsAny(e.name, "/\x00") || parent.Child(e.name) != nil {
		return sandbox.Invalidf("directory %.256q has an entry %.256q", dir, e.name)
	}
	if n := r.nodes[e.nid]; n != nil {
		if n.IsDir() {
			return sandbox.Invalidf("directory %.256q has two names", path.Join(dir, e.name))
		}
		return r.tree.Add(parent, e.name, n)
	}
	n, rec, err := r.inode(e.nid)
	if err != nil {
		return fmt.Errorf("%.256q: %w", path.Join(dir, e.name), err)
	}
	r.nodes[e.nid] = n
	if err := r.tree.Add(parent, e.name, n); err != nil {
		return err
	}
	if err := r.tree.Charge(n); err != nil || !n.IsDir() {
		return err
	}
	return r.dir(ctx, path.Join(dir, e.name), n, rec)
}
