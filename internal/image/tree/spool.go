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
	part := Extent{File: s.file, Off: s.end, Bytes: size}
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

// Mark is the place up to which the spool is in use.
func (s *Spool) Mark() int64 { return s.end }

// Rewind forgets what was added after mark was taken.
func (s *Spool) Rewind(mark int64) { s.end = mark }

// Close frees the spool. Contents that it returned cannot be read any more.
func (s *Spool) Close() error { return s.file.Close() }

// Extent is a Content that lies in one piece in an open file.
type Extent struct {
	File *os.File
	// Off is where it begins and Bytes how long it is.
	Off, Bytes int64
}

// Size is the number of bytes.
func (e Extent) Size() int64 { return e.Bytes }

// Open returns a reader of the extent. Closing it leaves the file open.
func (e Extent) Open() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(e.File, e.Off, e.Bytes)), nil
}

// plainWriter hides what else a writer can do, so that io.CopyBuffer uses the buffer.
type plainWriter struct{ io.Writer }
