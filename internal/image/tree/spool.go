package tree

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	copyBuffer = 256 << 10
	// sparseBlock is the unit in which file systems leave holes.
	sparseBlock = 4096
)

// Spool keeps the contents of files that arrive as a stream. It is a nameless file: whatever ends the process frees it.
type Spool struct {
	file *os.File
	end  int64
	// stale is up to where the file may hold what was forgotten; behind it are zeros.
	stale int64
	buf   []byte
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

// Add keeps the next size bytes of r. Blocks of zeros take no room.
func (s *Spool) Add(r io.Reader, size int64) (Content, error) {
	if size == 0 {
		return nil, nil //nolint:nilnil // no content is what an empty file has
	}
	part := Extent{File: s.file, Off: s.end, Bytes: size}
	w := &sparseWriter{file: s.file, at: s.end, stale: s.stale}
	n, err := io.CopyBuffer(w, io.LimitReader(r, size), s.buf)
	s.end += n
	if err == nil && w.written < s.end {
		err = s.file.Truncate(max(s.end, s.stale)) // the last bytes were left out
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("spool %d bytes: %w", size, err)
	case n != size:
		return nil, fmt.Errorf("spool %d bytes: %w after %d", size, io.ErrUnexpectedEOF, n)
	}
	return part, nil
}

// sparseWriter writes to a part of a file and leaves out blocks that are all zeros.
type sparseWriter struct {
	file *os.File
	at   int64
	// stale is up to where the part does not have zeros yet, and written up to where it was not left out.
	stale, written int64
}

// Write implements io.Writer.
func (s *sparseWriter) Write(p []byte) (n int, err error) {
	if s.at < s.stale || !isZero(p[len(p)-1:]) {
		defer func() { s.written = s.at }()
	}
	if s.at < s.stale {
		n, err = s.file.WriteAt(p, s.at)
	} else {
		n, err = WriteSparse(s.file, p, s.at)
	}
	s.at += int64(n)
	return n, err
}

// WriteSparse writes p at an offset of a file that has only zeros from there on, and leaves out blocks of zeros. Where the
// last ones are left out, the file stays shorter: truncate it in the end.
func WriteSparse(f *os.File, p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		run := 0
		for rest := p[done:]; run < len(rest); {
			block := nextBlock(rest[run:], off+int64(done+run))
			if isZero(block) {
				break
			}
			run += len(block)
		}
		n, err := f.WriteAt(p[done:done+run], off+int64(done))
		if done += n; err != nil {
			return done, err
		}
		for done < len(p) {
			block := nextBlock(p[done:], off+int64(done))
			if !isZero(block) {
				break
			}
			done += len(block)
		}
	}
	return done, nil
}

// nextBlock returns what of p, which lies at off, is in its first block.
func nextBlock(p []byte, off int64) []byte {
	return p[:min(int64(len(p)), sparseBlock-off%sparseBlock)]
}

func isZero(p []byte) bool { return p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]) }

// Mark is the place up to which the spool is in use.
func (s *Spool) Mark() int64 { return s.end }

// Rewind forgets what was added after mark was taken.
func (s *Spool) Rewind(mark int64) {
	s.stale = max(s.stale, s.end)
	s.end = mark
}

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
