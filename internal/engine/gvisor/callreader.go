package gvisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// callReader splits what comes over a socket into calls of gVisor's package urpc: each is one JSON value, and the files that
// belong to it come with its first byte.
type callReader struct {
	sock    int
	pending []byte
}

// next returns the next call and its files, which the caller closes. The error is io.EOF when the other side is gone.
func (r *callReader) next() ([]byte, []int, error) {
	var fds []int
	buf := make([]byte, 64<<10)
	oob := make([]byte, unix.CmsgSpace(4*maxCallFiles))
	for {
		call, rest, err := splitValue(r.pending)
		if err == nil && call != nil {
			r.pending = rest
			return call, fds, nil
		}
		if err == nil {
			var more []int
			if more, err = r.receive(buf, oob); err == nil {
				fds = append(fds, more...)
			}
		}
		if err == nil && len(fds) > maxCallFiles {
			err = fmt.Errorf("a call with more than %d files", maxCallFiles)
		}
		if err != nil {
			for _, fd := range fds {
				_ = unix.Close(fd) // nobody uses it
			}
			return nil, nil, err
		}
	}
}

// receive appends what has come to pending, and returns the files that came with it.
func (r *callReader) receive(buf, oob []byte) ([]int, error) {
	n, oobn, flags, _, err := unix.Recvmsg(r.sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
	switch {
	case errors.Is(err, unix.EINTR):
		return nil, nil
	case errors.Is(err, unix.ECONNRESET):
		return nil, io.EOF
	case err != nil:
		return nil, fmt.Errorf("receive: %w", err)
	}
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range messages {
		if rights, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, rights...)
		}
	}
	switch {
	case err != nil:
		return fds, fmt.Errorf("receive files: %w", err)
	case flags&unix.MSG_CTRUNC != 0:
		return fds, errors.New("a call with too many files")
	case n == 0:
		return fds, io.EOF
	}
	r.pending = append(r.pending, buf[:n]...)
	return fds, nil
}

// splitValue cuts the first JSON value off b; it is nil while it is not complete.
func splitValue(b []byte) (value, rest []byte, err error) {
	if len(bytes.TrimSpace(b)) == 0 {
		return nil, b, nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	var raw json.RawMessage
	switch err := d.Decode(&raw); {
	case errors.Is(err, io.ErrUnexpectedEOF) && len(b) <= maxMessage:
		return nil, b, nil
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, b, fmt.Errorf("a call of more than %d bytes", maxMessage)
	case err != nil:
		return nil, b, fmt.Errorf("parse a call: %w", err)
	}
	return raw, b[d.InputOffset():], nil
}

// reply sends a call's result, with an open file unless passed is -1.
func reply(sock int, result any, passed int, failed error) error {
	out := struct {
		Success bool   `json:"success"`
		Err     string `json:"err"`
		Result  any    `json:"result"`
	}{Success: failed == nil, Result: result}
	var oob []byte
	if failed != nil {
		out.Err, out.Result = failed.Error(), nil
	} else if passed >= 0 {
		oob = unix.UnixRights(passed)
	}
	raw, err := json.Marshal(out)
	if err != nil {
		return err
	}
	for len(raw) > 0 {
		n, err := unix.SendmsgN(sock, raw, oob, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EPIPE) {
			return nil // next sees the end
		}
		if err != nil {
			return fmt.Errorf("answer a call: %w", err)
		}
		raw, oob = raw[n:], nil
	}
	return nil
}
