package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/tree"
)

const (
	cloneBuffer = 1 << 20
	// flushEvery is after how many bytes the disk is set to work, so that little is left to flush at the end.
	flushEvery = 16 << 20
)

// imageWriter hashes an image or layer while it is written, and shares blocks with another image where the file system can.
type imageWriter struct {
	file *os.File
	sum  hash.Hash
	at   int64
	// flushed is up to where the disk was told to write.
	flushed int64
	// copies says that the file system does not share blocks.
	copies bool
	// shared is how many bytes are another file's too.
	shared int64
	buf    []byte
}

func newImageWriter(f *os.File) *imageWriter { return &imageWriter{file: f, sum: sha256.New()} }

// digest is that of all that was written.
func (o *imageWriter) digest() string { return "sha256:" + hex.EncodeToString(o.sum.Sum(nil)) }

// Write implements io.Writer. Blocks of zeros take no room.
func (o *imageWriter) Write(p []byte) (int, error) {
	n, err := tree.WriteSparse(o.file, p, o.at)
	o.at += int64(n)
	_, _ = o.sum.Write(p[:n])
	if o.at-o.flushed >= flushEvery {
		// Only a hint: Sync reports what cannot be written.
		_ = unix.SyncFileRange(int(o.file.Fd()), o.flushed, o.at-o.flushed, unix.SYNC_FILE_RANGE_WRITE)
		o.flushed = o.at
	}
	return n, err
}

// Clone implements erofs.Cloner. What cannot be shared is copied.
func (o *imageWriter) Clone(ctx context.Context, src *os.File, off, size int64) error {
	if !o.share(src, off, size) {
		return o.read(ctx, src, off, size, func(p []byte) error {
			_, err := o.Write(p)
			return err
		})
	}
	o.at += size
	o.shared += size
	return o.read(ctx, src, off, size, func(p []byte) error {
		_, err := o.sum.Write(p)
		return err
	})
}

// flush completes the file and has the disk write it.
func (o *imageWriter) flush() error {
	if err := o.file.Truncate(o.at); err != nil { // where the last bytes were left out
		return err
	}
	return o.file.Sync()
}

func (o *imageWriter) share(src *os.File, off, size int64) bool {
	if o.copies {
		return false
	}
	err := unix.IoctlFileCloneRange(int(o.file.Fd()), &unix.FileCloneRange{
		Src_fd: int64(src.Fd()), Src_offset: uint64(off), Src_length: uint64(size), Dest_offset: uint64(o.at), //nolint:gosec // never negative
	})
	o.copies = err != nil
	return err == nil
}

// read goes through a part of another file.
func (o *imageWriter) read(ctx context.Context, src *os.File, off, size int64, see func([]byte) error) error {
	if o.buf == nil {
		o.buf = make([]byte, cloneBuffer)
	}
	for end := off + size; off < end; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := src.ReadAt(o.buf[:min(cloneBuffer, end-off)], off)
		if n == 0 {
			return fmt.Errorf("read %s at %d: %w", src.Name(), off, errors.Join(err, io.ErrUnexpectedEOF))
		}
		if err := see(o.buf[:n]); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}
