package gvisor

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// The sizes of what stateipc puts into a packet window, in bytes.
const (
	writeHeader     = 16 // completions wanted, finalize, reserve (8)
	writeTransfer   = 16 // id, handle, ranges, padding
	readHeader      = 8  // completions wanted, padding
	readTransfer    = 24 // id, padding, offset (8), handle, ranges
	rangeBytes      = 16 // start (8), end (8)
	answerHeader    = 8  // errno, padding
	completionBytes = 12 // id, bytes, errno

	windowBytes = writeHeader + maxTransfers*(readTransfer+maxRanges*rangeBytes)

	endOfFile   = -1 // in place of an errno
	cloneAlign  = 4096
	maxFileSize = 1 << 50
)

// span is a range of a client's file.
type span struct{ start, end uint64 }

// transfer is one that the sentry asks for.
type transfer struct {
	id, handle uint32
	offset     int64 // in the served file, when reading
	spans      []span
}

// completion says what became of a transfer.
type completion struct {
	id, bytes uint32
	errno     int32
}

// answer carries out a request of so many transfers and puts the answer in its place. It returns the number of completions,
// and whether nothing follows.
func (f *servedFile) answer(window []byte, transfers uint32) (completions uint32, last bool) {
	request := bytes.Clone(window) // the sentry can change the window at any time
	if f.server.write && binary.NativeEndian.Uint32(request[4:]) != 0 {
		if !f.piped {
			f.server.out.finished()
		}
		putAnswer(window, int32(f.server.errno.Load()), nil) //nolint:gosec // an errno
		return 0, true
	}
	list, ok := parseTransfers(request, transfers, f.server.write)
	if !ok {
		putAnswer(window, int32(unix.EINVAL), nil)
		return 0, true
	}
	done := make([]completion, 0, len(list))
	for _, t := range list {
		n, err := f.transfer(t)
		done = append(done, completion{id: t.id, bytes: n, errno: f.server.number(err)})
	}
	putAnswer(window, 0, done)
	return uint32(len(done)), false //nolint:gosec // few
}

// errShort means that a file ends before a transfer does.
var errShort = errors.New("end of file")

// number turns an error into what goes over the wire, and remembers the first.
func (s *fileServer) number(err error) int32 {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errShort):
		return endOfFile
	case !errors.As(err, &errno):
		errno = unix.EIO
	}
	s.errno.CompareAndSwap(0, int64(errno))
	return int32(errno)
}

// parseTransfers reads a request. It must be of our own memory.
func parseTransfers(request []byte, count uint32, write bool) ([]transfer, bool) {
	if count > maxTransfers {
		return nil, false
	}
	head, each := readHeader, readTransfer
	if write {
		head, each = writeHeader, writeTransfer
	}
	rest := request[head:]
	list := make([]transfer, 0, count)
	for range count {
		if len(rest) < each {
			return nil, false
		}
		t := transfer{id: binary.NativeEndian.Uint32(rest)}
		handle := rest[4:]
		if !write {
			t.offset = int64(binary.NativeEndian.Uint64(rest[8:])) //nolint:gosec // checked below
			handle = rest[16:]
		}
		t.handle = binary.NativeEndian.Uint32(handle)
		n := binary.NativeEndian.Uint32(handle[4:])
		rest = rest[each:]
		if t.id >= maxTransfers || n == 0 || n > maxRanges || len(rest) < int(n)*rangeBytes || t.offset < 0 || t.offset > maxFileSize {
			return nil, false
		}
		if t.spans = parseSpans(rest[:n*rangeBytes]); t.spans == nil {
			return nil, false
		}
		rest = rest[n*rangeBytes:]
		list = append(list, t)
	}
	return list, true
}

// parseSpans reads ranges, which together have at least one and at most maxTransfer bytes; nil where they do not.
func parseSpans(raw []byte) []span {
	out := make([]span, 0, len(raw)/rangeBytes)
	total := uint64(0)
	for ; len(raw) > 0; raw = raw[rangeBytes:] {
		s := span{binary.NativeEndian.Uint64(raw), binary.NativeEndian.Uint64(raw[8:])}
		if s.start >= s.end || s.end > maxClientMap || s.end-s.start > maxTransfer {
			return nil
		}
		if total += s.end - s.start; total > maxTransfer {
			return nil
		}
		out = append(out, s)
	}
	return out
}

// putAnswer writes an answer.
func putAnswer(window []byte, errno int32, done []completion) {
	e := binary.NativeEndian
	e.PutUint32(window, uint32(errno)) //nolint:gosec // as bits
	e.PutUint32(window[4:], 0)
	for i, c := range done {
		at := window[answerHeader+i*completionBytes:]
		e.PutUint32(at, c.id)
		e.PutUint32(at[4:], c.bytes)
		e.PutUint32(at[8:], uint32(c.errno)) //nolint:gosec // as bits
	}
}

// transfer carries out one transfer and returns how many bytes it moved.
func (f *servedFile) transfer(t transfer) (uint32, error) {
	c := f.client(t.handle)
	if c == nil {
		return 0, unix.EINVAL
	}
	if f.piped && f.server.write {
		if err := f.server.out.wait(f.server.gone); err != nil {
			return 0, err
		}
	}
	offset := t.offset
	if f.server.write {
		offset = f.offset
	}
	moved := uint32(0)
	for _, s := range t.spans {
		if s.end > c.size || offset > maxFileSize {
			return moved, unix.EINVAL
		}
		n, err := f.move(c, s, offset)
		offset += int64(n)
		moved += uint32(n) //nolint:gosec // at most maxTransfer
		if f.server.write {
			f.offset = offset
		}
		if err != nil {
			return moved, err
		}
	}
	return moved, nil
}

// move brings one range from where it is to where it shall be.
func (f *servedFile) move(c *clientFile, s span, offset int64) (int, error) {
	length := s.end - s.start
	if f.file == nil {
		return int(length), nil //nolint:gosec // at most maxTransfer
	}
	if c.clone && (s.start|s.end|uint64(offset))%cloneAlign == 0 { //nolint:gosec // not negative
		err := f.share(c, s, offset)
		if err == nil {
			f.server.shared.Add(int64(length)) //nolint:gosec // at most maxTransfer
			return int(length), nil            //nolint:gosec // as above
		}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) {
			return 0, err
		}
		c.clone = false
	}
	if c.mapping == nil {
		prot := unix.PROT_READ
		if !f.server.write {
			prot |= unix.PROT_WRITE
		}
		m, err := unix.Mmap(int(c.file.Fd()), 0, int(c.size), prot, unix.MAP_SHARED) //nolint:gosec // at most maxClientMap
		if err != nil {
			return 0, err
		}
		c.mapping = m
	}
	return f.copy(c.mapping[s.start:s.end], offset)
}

// share has the file system let both files have the same blocks.
func (f *servedFile) share(c *clientFile, s span, offset int64) error {
	from, to := c.file, f.file
	r := unix.FileCloneRange{Src_offset: s.start, Src_length: s.end - s.start, Dest_offset: uint64(offset)} //nolint:gosec // not negative
	if !f.server.write {
		from, to = f.file, c.file
		r.Src_offset, r.Dest_offset = r.Dest_offset, r.Src_offset
	}
	r.Src_fd = int64(from.Fd()) //nolint:gosec // a descriptor
	return unix.IoctlFileCloneRange(int(to.Fd()), &r)
}

// copy reads or writes the whole of part. Only the kernel touches it: where the sentry has cut its file off, that is EFAULT.
func (f *servedFile) copy(part []byte, offset int64) (int, error) {
	if f.piped && !f.server.write {
		return f.in.readAt(part, offset)
	}
	done := 0
	for done < len(part) {
		var n int
		var err error
		switch {
		case f.piped:
			n, err = unix.Write(int(f.file.Fd()), part[done:])
		case f.server.write:
			n, err = unix.Pwrite(int(f.file.Fd()), part[done:], offset+int64(done))
		default:
			n, err = unix.Pread(int(f.file.Fd()), part[done:], offset+int64(done))
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return done, err
		case n == 0:
			return done, errShort
		}
		done += n
	}
	return done, nil
}
