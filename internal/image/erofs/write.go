// Package erofs writes a file tree as an EROFS image that gVisor and Linux mount, and reads such an image back.
//
// It owns the on-disk format, as far as a root file system needs it: 4 KiB blocks, nothing compressed, regular files at
// block boundaries, hard links shared, no extended attributes (gVisor refuses an inode that has any). The same tree gives
// the same bytes. An image is written front to back in one pass, so that it can be hashed on the way. It must not decide
// what an image holds. It has no state and starts no goroutines.
package erofs

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/tree"
)

const (
	bufferSize = 1 << 20
	// maxClone is how many bytes are cloned at once, so that cancelling does not take long.
	maxClone = 64 << 20
)

// Cloner is a writer that can share blocks with another file instead of copying them.
type Cloner interface {
	io.Writer
	// Clone appends the bytes of src from off to off+size. Both are multiples of 4096.
	Clone(ctx context.Context, src *os.File, off, size int64) error
}

// Write writes the tree below root as an image, and returns its size in bytes. It calls progress, which may be nil, now
// and then with the bytes written and to write. If w is a Cloner, it gets the contents that come from an image that Read
// has read in as few pieces as possible.
func Write(ctx context.Context, w io.Writer, root *tree.Node, progress func(done, total int64)) (int64, error) {
	l, err := plan(ctx, root)
	if err != nil {
		return 0, err
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	out := &writer{layout: l, out: bufio.NewWriterSize(w, bufferSize), progress: progress, zeros: make([]byte, blockSize)}
	out.cloner, _ = w.(Cloner)
	if err := out.all(ctx); err != nil {
		return 0, err
	}
	return out.at, nil
}

// writer follows a layout from the image's first byte to its last.
type writer struct {
	*layout
	out *bufio.Writer
	// head collects the first block, whose checksum must be known before it is written; nil afterwards.
	head     []byte
	headDone bool
	at       int64
	scratch  []byte
	zeros    []byte
	progress func(done, total int64)
	// cloner is nil where the writer cannot share; run is what it gets next.
	cloner Cloner
	run    tree.Extent
}

func (w *writer) all(ctx context.Context) error {
	w.write(w.super())
	for _, ino := range w.inodes {
		w.padTo(int64(ino.nid) << slotBits) //nolint:gosec // comes from an int64
		w.write(w.inode(ino))
	}
	w.padTo(align(w.metaEnd, blockSize))
	for _, files := range []bool{false, true} {
		for _, ino := range w.inodes {
			if files != (ino.node.Type() == unix.S_IFREG) || ino.size == int64(ino.inline) {
				continue
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := w.data(ctx, ino); err != nil {
				return err
			}
		}
	}
	if err := w.flushRun(ctx); err != nil {
		return err
	}
	w.progress(w.at, w.blocks<<blockBits)
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	return nil
}

// write appends to the image. Errors stay in the buffered writer until its next flush.
func (w *writer) write(b []byte) {
	w.at += int64(len(b))
	if !w.headDone {
		n := min(len(b), blockSize-len(w.head))
		w.head = append(w.head, b[:n]...)
		b = b[n:]
		if len(w.head) < blockSize {
			return
		}
		w.headDone = true
		checksum(w.head)
		_, _ = w.out.Write(w.head)
		w.head = nil
	}
	_, _ = w.out.Write(b)
}

func (w *writer) padTo(at int64) {
	for w.at < at {
		w.write(w.zeros[:min(blockSize, at-w.at)])
	}
}

// checksum puts the checksum of the first block's part from the superblock on into the superblock: CRC-32C, seeded with
// ones and not inverted at the end.
func checksum(block []byte) {
	sum := ^crc32.Checksum(block[superStart:], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(block[superStart+4:], sum)
}

// super returns the image's start up to the first inode.
func (w *writer) super() []byte {
	b := make([]byte, superStart, superStart+superSize)
	le := binary.LittleEndian
	b = le.AppendUint32(b, magic)
	b = le.AppendUint32(b, 0) // checksum
	b = le.AppendUint32(b, featureChecksum|featureMtime)
	b = append(b, blockBits, 0)
	b = le.AppendUint16(b, uint16(w.inodes[0].nid)) //nolint:gosec // the root is first
	b = le.AppendUint64(b, uint64(len(w.inodes)))
	b = le.AppendUint64(b, 0)                // build time: none, for the same tree must give the same bytes
	b = le.AppendUint32(b, 0)                // its nanoseconds
	b = le.AppendUint32(b, uint32(w.blocks)) //nolint:gosec // the planner checked it
	return b[:superStart+superSize]          // the rest is addresses and features that are all zero
}

func (w *writer) inode(ino *inode) []byte {
	n, le := ino.node, binary.LittleEndian
	b := w.scratch[:0]
	b = le.AppendUint16(b, ino.format())
	b = le.AppendUint16(b, 0)              // no extended attributes
	b = le.AppendUint16(b, uint16(n.Mode)) //nolint:gosec // 16 bits of type and permissions
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, uint64(ino.size)) //nolint:gosec // never negative
	switch n.Type() {
	case unix.S_IFCHR, unix.S_IFBLK:
		b = le.AppendUint32(b, n.Rdev)
	default:
		b = le.AppendUint32(b, ino.block)
	}
	b = le.AppendUint32(b, ino.number)
	b = le.AppendUint32(b, n.UID)
	b = le.AppendUint32(b, n.GID)
	b = le.AppendUint64(b, uint64(n.Sec)) //nolint:gosec // the format keeps times before 1970 this way
	b = le.AppendUint32(b, n.Nsec)
	b = le.AppendUint32(b, ino.links)
	b = append(b, make([]byte, 16)...)
	if ino.inline > 0 {
		b = ino.appendTail(b)
	}
	w.scratch = b
	return b
}

func (ino *inode) format() uint16 {
	if ino.inline > 0 {
		return formatInline
	}
	return formatPlain
}

func (ino *inode) appendTail(b []byte) []byte {
	if ino.node.IsDir() {
		return appendDirBlock(b, ino, ino.parts[len(ino.parts)-1])
	}
	return append(b, ino.node.Target...)
}

// data writes an inode's blocks.
func (w *writer) data(ctx context.Context, ino *inode) error {
	switch ino.node.Type() {
	case unix.S_IFREG:
		if err := w.file(ctx, ino); err != nil {
			return err
		}
		w.progress(w.at, w.blocks<<blockBits)
	case unix.S_IFDIR:
		for _, part := range ino.parts[:(ino.size-int64(ino.inline)+blockSize-1)>>blockBits] {
			w.scratch = appendDirBlock(w.scratch[:0], ino, part)
			w.write(w.scratch)
			w.padTo(align(w.at, blockSize))
		}
	case unix.S_IFLNK:
		w.write([]byte(ino.node.Target))
	}
	w.padTo(align(w.at, blockSize))
	return nil
}

// file copies a file's contents, which must have the size that the layout was made for.
func (w *writer) file(ctx context.Context, ino *inode) error {
	if b, ok := ino.node.Content.(blocks); ok && w.cloner != nil {
		return w.clone(ctx, b)
	}
	if err := w.flushRun(ctx); err != nil {
		return err
	}
	r, err := ino.node.Content.Open()
	if err != nil {
		return fmt.Errorf("read a file of the image: %w", err)
	}
	n, err := io.Copy(w.out, io.LimitReader(&checked{ctx: ctx, Reader: r}, ino.size))
	w.at += n
	if err == nil && n != ino.size {
		err = io.ErrUnexpectedEOF
	}
	if err := errors.Join(err, r.Close()); err != nil {
		return fmt.Errorf("copy %d bytes of a file into the image: %w", ino.size, err)
	}
	return nil
}

// clone adds a file's blocks to the run of those that are cloned together.
func (w *writer) clone(ctx context.Context, b blocks) error {
	size := align(b.Bytes, blockSize)
	if w.run.File != b.File || w.run.Off+w.run.Bytes != b.Off || w.run.Bytes+size > maxClone {
		if err := w.flushRun(ctx); err != nil {
			return err
		}
		w.run = tree.Extent{File: b.File, Off: b.Off}
	}
	w.run.Bytes += size
	w.at += size
	return nil
}

// flushRun clones what has come together.
func (w *writer) flushRun(ctx context.Context) error {
	if w.run.Bytes == 0 {
		return nil
	}
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	err := w.cloner.Clone(ctx, w.run.File, w.run.Off, w.run.Bytes)
	w.run = tree.Extent{}
	if err != nil {
		return fmt.Errorf("clone a part of another image: %w", err)
	}
	return nil
}

// checked stops reading when its context ends.
type checked struct {
	ctx context.Context //nolint:containedctx // lives for one copy
	io.Reader
}

func (c *checked) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.Reader.Read(p)
}
