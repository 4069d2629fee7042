package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// A file travels as frames, one for each extent: its offset (8 bytes, big endian), its length (4 bytes) and its bytes. An
// extent is a run of blocks that are not all zeros; it ends at the latest where a chunk does. So the frames of a file
// follow from its contents alone, whatever its file system makes of holes, and whoever has the first chunks of a file knows
// how long their frames were. The last frame has the file's size as its offset and the length 0; the CRC-32C of all frames
// before it comes behind: against damage, since what guards the way against people is its TLS.
const (
	chunkBytes = 1 << 20
	blockBytes = 4096
	frameBytes = 12
	// flushBytes is how much is received before the kernel is told to begin writing it to the disk.
	flushBytes = 8 << 20
)

// newSum begins the checksum of a file's frames: CRC-32C (RFC 3720, appendix B.4), which processors have instructions for.
func newSum() hash.Hash { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) }

// zeros is what a block is compared with.
//
//nolint:gochecknoglobals // never written
var zeros [blockBytes]byte

// frames calls do with each frame of the first size bytes of a file, header and contents in one piece, which is do's until it returns.
func frames(ctx context.Context, f *os.File, size int64, do func(off int64, frame []byte) error) error {
	// The header of an extent is put where zeros were before it, or the room that is left for the first one.
	buf := make([]byte, frameBytes+chunkBytes)
	for at := int64(0); at < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		data, err := nextData(f, at)
		if err != nil || data >= size {
			return err
		}
		at = max(at, data-data%chunkBytes)
		n := int(min(chunkBytes, size-at))
		if _, err := f.ReadAt(buf[frameBytes:frameBytes+n], at); err != nil {
			return err
		}
		for from, to := run(buf[frameBytes:frameBytes+n], 0); from < to; from, to = run(buf[frameBytes:frameBytes+n], to) {
			frame := buf[from : frameBytes+to]
			putHeader(frame, at+int64(from), to-from)
			if err := do(at+int64(from), frame); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	return nil
}

// nextData returns where the data begins that is at an offset or behind it; the largest number where there is none.
func nextData(f *os.File, at int64) (int64, error) {
	to, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 1<<63 - 1, nil
	case errors.Is(err, unix.EINVAL):
		return at, nil // a file system without holes
	}
	return to, err
}

// run returns the first run of blocks that are not all zeros, from an offset on; an empty one where there is none.
func run(chunk []byte, at int) (from, to int) {
	for at < len(chunk) && isZero(chunk, at) {
		at += blockBytes
	}
	from = min(at, len(chunk))
	for at < len(chunk) && !isZero(chunk, at) {
		at += blockBytes
	}
	return from, min(at, len(chunk))
}

func isZero(chunk []byte, at int) bool {
	block := chunk[at:min(at+blockBytes, len(chunk))]
	return bytes.Equal(block, zeros[:len(block)])
}

func putHeader(frame []byte, off int64, n int) {
	binary.BigEndian.PutUint64(frame, uint64(off))   //nolint:gosec // an offset in a file
	binary.BigEndian.PutUint32(frame[8:], uint32(n)) //nolint:gosec // at most a chunk
}

// sendFile writes the frames of a file, without those before from, which is where a chunk begins. They are part of the
// checksum all the same.
func sendFile(ctx context.Context, w io.Writer, f *os.File, size, from int64) error {
	sum := newSum()
	err := frames(ctx, f, size, func(off int64, frame []byte) error {
		_, _ = sum.Write(frame) // never fails
		if off < from {
			return nil
		}
		_, err := w.Write(frame)
		return err
	})
	if err != nil {
		return err
	}
	last := make([]byte, frameBytes, frameBytes+crc32.Size)
	putHeader(last, size, 0)
	_, err = w.Write(sum.Sum(last))
	return err
}

// receiver writes a file from its frames. One goroutine reads them and another checks and writes them, since both take
// about as long.
type receiver struct {
	f    *os.File
	size int64
	next int64 // nothing comes before it any more
	// moved counts what was read.
	moved int64

	sum    hash.Hash
	begun  int64 // up to where the kernel has been told to write to the disk
	failed atomic.Bool
}

// waiting is how many frames may have been read and not written.
const waiting = 3

// arrived is a frame that was read.
type arrived struct {
	off int64
	raw []byte
}

// receive reads frames up to the last. Errors: ErrInvalid for what no sender writes, ErrConflict for a wrong checksum.
func (v *receiver) receive(ctx context.Context, r io.Reader) error {
	free, full := make(chan []byte, waiting), make(chan arrived, waiting)
	for range waiting {
		free <- nil // made when it is needed
	}
	written := make(chan error, 1)
	go func() { written <- v.write(full, free) }()
	want, err := v.read(ctx, r, full, free)
	close(full)
	if werr := <-written; werr != nil {
		return werr
	}
	if err != nil {
		return err
	}
	if got := v.sum.Sum(nil); !bytes.Equal(got, want) {
		return sandbox.Conflictf("what arrived has checksum %x, what was sent has %x", got, want)
	}
	return v.f.Truncate(v.size)
}

// read hands frames over until the last, and returns the checksum that comes with it.
func (v *receiver) read(ctx context.Context, r io.Reader, full chan<- arrived, free <-chan []byte) ([]byte, error) {
	for !v.failed.Load() {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		buf := <-free
		if buf == nil {
			buf = make([]byte, frameBytes+chunkBytes)
		}
		if _, err := io.ReadFull(r, buf[:frameBytes]); err != nil {
			return nil, unexpected(err)
		}
		off, n, err := v.header(buf)
		if err != nil {
			return nil, err
		}
		rest := buf[frameBytes : frameBytes+n]
		if n == 0 {
			rest = buf[:crc32.Size]
		}
		if _, err := io.ReadFull(r, rest); err != nil {
			return nil, unexpected(err)
		}
		v.moved += int64(frameBytes + len(rest))
		if n == 0 {
			return rest, nil
		}
		v.next = off + int64(n)
		full <- arrived{off, buf[:frameBytes+n]}
	}
	return nil, nil // write says why
}

// write writes what was read, and goes on taking it after an error.
func (v *receiver) write(full <-chan arrived, free chan<- []byte) (err error) {
	for a := range full {
		if err == nil {
			if err = v.writeFrame(a); err != nil {
				v.failed.Store(true)
			}
		}
		free <- a.raw[:cap(a.raw)]
	}
	return err
}

func (v *receiver) writeFrame(a arrived) error {
	_, _ = v.sum.Write(a.raw) // never fails
	data := a.raw[frameBytes:]
	if _, err := v.f.WriteAt(data, a.off); err != nil {
		return err
	}
	if to := a.off + int64(len(data)); to-v.begun >= flushBytes {
		// What it is worth is speed alone: the flush at the end has less to do.
		_ = unix.SyncFileRange(int(v.f.Fd()), v.begun, to-v.begun, unix.SYNC_FILE_RANGE_WRITE)
		v.begun = to
	}
	return nil
}

// header reads a frame's header. The last one has length 0.
func (v *receiver) header(b []byte) (off int64, n int, err error) {
	o, l := binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
	size, next := uint64(v.size), uint64(v.next) //nolint:gosec // not negative
	switch {
	case l == 0 && o == size:
		return v.size, 0, nil
	case l == 0 || o < next || o%blockBytes != 0 || o >= size || uint64(l) > size-o || uint64(l) > chunkBytes-o%chunkBytes:
		return 0, 0, sandbox.Invalidf("an extent of %d bytes at %d, after %d of %d bytes", l, o, v.next, v.size)
	}
	return int64(o), int(l), nil //nolint:gosec // at most size
}

// unexpected says that a stream ended too early, if that is why it cannot be read.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the stream broke off: %w", sandbox.ErrUnavailable, io.ErrUnexpectedEOF)
	}
	return err
}
