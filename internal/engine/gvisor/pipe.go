package gvisor

import (
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A served file may be a pipe; that of the guest's pages is one where a guest is streamed. Written to, it takes the pages once
// all other files are whole, since who reads needs these first. Read from, it gives them as they come, straight to where they
// belong.

// keptFile is among a server's files where one of them is read from a pipe, and is never served: what is asked for too late
// waits in it.
const keptFile = ".kept"

// outflow says when what goes through a pipe may begin.
type outflow struct {
	whole chan struct{} // closed when all other files are

	mu   sync.Mutex
	open int // of the others
}

// finished notes that the sentry has written all of a file that is no pipe.
func (o *outflow) finished() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open--; o.open == 0 {
		close(o.whole)
	}
}

// wait waits until the other files are whole, or fails when the sentry has hung up.
func (o *outflow) wait(gone <-chan struct{}) error {
	select {
	case <-o.whole:
		return nil
	case <-gone:
		return unix.ECONNRESET
	}
}

// incoming is a file that comes through a pipe.
type incoming struct {
	pipe, kept *os.File
	next       int64 // how much has come
}

// readAt fills part, unless the file ends before. What is before it and has not been asked for yet is kept; nothing may be
// asked for twice.
func (p *incoming) readAt(part []byte, at int64) (int, error) {
	if err := p.keepUntil(at); err != nil {
		return 0, err
	}
	early := min(p.next-at, int64(len(part)))
	if n, err := io.ReadFull(io.NewSectionReader(p.kept, at, early), part[:early]); err != nil {
		return n, err
	}
	done := int(early)
	for done < len(part) {
		n, err := unix.Read(int(p.pipe.Fd()), part[done:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return done, err
		case n == 0:
			return done, errShort
		}
		done += n
		p.next += int64(n)
	}
	return done, nil
}

// keepUntil keeps what comes before at.
func (p *incoming) keepUntil(at int64) error {
	if p.next >= at {
		return nil
	}
	n, err := io.Copy(io.NewOffsetWriter(p.kept, p.next), io.LimitReader(p.pipe, at-p.next))
	p.next += n
	if err == nil && p.next < at {
		err = errShort
	}
	return err
}

// goMark is behind the last page in a pipe once the guest may run. A pipe that ends without it is one whose writer has died.
const goMark = "!"

// released waits for the end of the pipe, and reports whether the guest may run.
func (p *incoming) released() bool {
	rest, err := io.ReadAll(io.LimitReader(p.pipe, int64(len(goMark))+1))
	return err == nil && string(rest) == goMark
}

// isPipe reports whether a file is a pipe; nil is none.
func isPipe(f *os.File) bool {
	if f == nil {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeNamedPipe != 0
}
