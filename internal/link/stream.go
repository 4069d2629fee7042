package link

import (
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
