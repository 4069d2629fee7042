package tree

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const copyBuffer = 256 << 10

// Spool keeps the contents of files that arrive as a stream. It is a nameless file: whatever ends the process frees it.
type Spool struct {
	file *os.File
	end  int64
	buf  []byte
}

// NewSpool opens a spool on the file system of the directory.
func NewSpool(dir string) (*Spool, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600) //nolint:gosec // a directory of the caller's own
	if err != nil {
		if f, err = os.CreateTemp(dir, "spool-*"); err != nil {
			return nil, fmt.Errorf("open a spool: %w", err)
		}
		if err := os.Remove(f.Name()); err != nil {
			return nil, fmt.Errorf("open a spool: %w", err)
		}
	}
	return &Spool{file: f, buf: make([]byte, copyBuffer)}, nil
}

// Add keeps the next size bytes of r.
func (s *Spool) Add(r io.Reader, size int64) (Content, error) {
	if size == 0 {
		return nil, nil //nolint:nilnil // no content is what an empty file has
	}
	part := span{file: s.file, off: s.end, size: size}
	n, err := io.CopyBuffer(plainWriter{io.NewOffsetWriter(s.file, s.end)}, io.LimitReader(r, size), s.buf)
	s.end += n
	switch {
	case err != nil:
		return nil, fmt.Errorf("spool %d bytes: %w", size, err)
	case n != size:
		return nil, fmt.Errorf("spool %d bytes: %w after %d", size, io.ErrUnexpectedEOF, n)
	}
	return part, nil
}

// Close frees the spool. Contents that it returned cannot be read any more.
func (s *Spool) Close() error { return s.file.Close() }

// span is a part of a spool.
type span struct {
	file      *os.File
	off, size int64
}

func (p span) Size() int64 { return p.size }

func (p span) Open() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(p.file, p.off, p.size)), nil
}

// plainWriter hides what else a writer can do, so that io.CopyBuffer uses the buffer.
type plainWriter struct{ io.Writer }
