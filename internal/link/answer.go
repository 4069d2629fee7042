package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// RemoteError is what the accepting end of a stream answered: it was reached, and says no. errors.Is finds the kind of
// internal/sandbox that it had there, and syscall.ECONNREFUSED where nobody listens on a guest's port.
type RemoteError struct {
	text string
	is   []error
}

// Error is the text of the other end.
func (e *RemoteError) Error() string { return e.text }

// Unwrap returns what the error is.
func (e *RemoteError) Unwrap() []error { return e.is }

// marks are what survives of an error, each a bit of the answer's second byte and the one after it.
func marks() []error {
	return []error{
		sandbox.ErrNotFound, sandbox.ErrConflict, sandbox.ErrInvalid, sandbox.ErrExhausted, sandbox.ErrUnavailable,
		sandbox.ErrDenied, sandbox.ErrUnsupported, syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ETIMEDOUT,
	}
}

const (
	answerOK     = 0
	answerError  = 1
	answerHead   = 5 // status, marks, length of the text
	maxErrorText = 1 << 10
)

// answer returns the answer to a head: one byte of 0, or 1, the error's marks, and its text, cut to 1 KiB.
func answer(err error) []byte {
	if err == nil {
		return []byte{answerOK}
	}
	var bits uint16
	for i, mark := range marks() {
		if errors.Is(err, mark) {
			bits |= 1 << i
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		bits |= 1 << slices.Index(marks(), sandbox.ErrUnavailable) // it was the other end's time that ran out, not the caller's
	}
	text := err.Error()
	text = text[:min(len(text), maxErrorText)]
	b := binary.BigEndian.AppendUint16([]byte{answerError}, bits)
	b = binary.BigEndian.AppendUint16(b, uint16(len(text))) //nolint:gosec // cut above
	return append(b, text...)
}

// readAnswer reads one answer and not a byte more. It returns a *RemoteError where the other end said no.
func readAnswer(r io.Reader) error {
	var head [answerHead]byte
	if _, err := io.ReadFull(r, head[:1]); err != nil {
		return cutShort(err)
	}
	switch head[0] {
	case answerOK:
		return nil
	case answerError:
	default:
		return sandbox.Invalidf("answer to a stream's head begins with %d: want 0 or 1", head[0])
	}
	if _, err := io.ReadFull(r, head[1:]); err != nil {
		return cutShort(err)
	}
	size := binary.BigEndian.Uint16(head[3:])
	if size > maxErrorText {
		return sandbox.Invalidf("error of %d bytes: at most %d are allowed", size, maxErrorText)
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(r, text); err != nil {
		return cutShort(err)
	}
	remote := &RemoteError{text: string(text)}
	bits := binary.BigEndian.Uint16(head[1:])
	for i, mark := range marks() {
		if bits&(1<<i) != 0 {
			remote.is = append(remote.is, mark)
		}
	}
	return remote
}

// cutShort says that a stream ended before its answer: who should have answered is gone.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the stream ended before its answer: %w", errShort)
	}
	return fmt.Errorf("read answer: %w: %w", sandbox.ErrUnavailable, err)
}
