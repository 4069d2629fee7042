package link

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// stream is a stream of a shared connection. Unlike yamux's, it can be read no more once it was closed, and its deadlines
// give the errors that net's do.
type stream struct {
	*yamux.Stream

	closed atomic.Bool
}

// Read reads; after Close it is net.ErrClosed.
func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	return n, s.plain(err)
}

// Write writes.
func (s *stream) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	return n, s.plain(err)
}

func (s *stream) plain(err error) error {
	switch {
	case err == nil:
		return nil
	case s.closed.Load():
		return net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	}
	return err
}

// Close ends both directions and wakes who reads or writes.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	err := s.Stream.Close()
	_ = s.SetDeadline(time.Unix(1, 0)) // never fails
	return err
}

// The header of yamux, see its spec.md: version, type, flags, stream, length.
const (
	yamuxHeader   = 12
	yamuxTypeAt   = 1
	yamuxTypeData = 0
	yamuxLengthAt = 8
)

// joiner is a shared connection as yamux writes to it. Yamux writes the header of a frame and then its data; the joiner
// sends both at once, which saves a TLS record and a system call for each.
type joiner struct {
	net.Conn

	// buf holds a header whose data is still to come; only yamux's one writer touches it.
	buf []byte
}

// Write sends p, or keeps it for the next Write.
func (j *joiner) Write(p []byte) (int, error) {
	if len(j.buf) == 0 {
		if len(p) == yamuxHeader && p[yamuxTypeAt] == yamuxTypeData && binary.BigEndian.Uint32(p[yamuxLengthAt:]) > 0 {
			j.buf = append(j.buf, p...)
			return len(p), nil
		}
		return j.Conn.Write(p)
	}
	j.buf = append(j.buf, p...)
	_, err := j.Conn.Write(j.buf)
	j.buf = j.buf[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
