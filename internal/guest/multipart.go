package guest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/textproto"
)

const (
	// maxBoundary is RFC 2046's own limit.
	maxBoundary = 70
	// maxPartHeader bounds the header of one part of a form.
	maxPartHeader = 16 << 10
)

// formReader reads a multipart/form-data body. It hands out the contents of parts straight from its one large buffer,
// where the standard library's reader copies them, in pieces of at most 4 KiB, through several small ones: uploads are
// mostly forms, and large.
type formReader struct {
	src       io.Reader
	delimiter []byte
	buf       []byte
	// window is what was read and not used yet; a part of buf.
	window []byte
	err    error // why nothing more can be read
}

// newFormReader uses buf, which must hold more than a part's header and a delimiter.
func newFormReader(src io.Reader, boundary string, buf []byte) (*formReader, error) {
	if boundary == "" || len(boundary) > maxBoundary {
		return nil, fmt.Errorf("the boundary has %d bytes: 1 to %d are allowed", len(boundary), maxBoundary)
	}
	f := &formReader{src: src, delimiter: []byte("\r\n--" + boundary), buf: buf}
	f.window = buf[:copy(buf, "\r\n")] // the first delimiter may lack its line break
	return f, nil
}

// more makes room and reads until the buffer is full. It fails where nothing came.
func (f *formReader) more() error {
	had := copy(f.buf, f.window)
	f.window = f.buf[:had]
	if f.err == nil && had < len(f.buf) {
		var n int
		n, f.err = fillBuffer(f.src, f.buf[had:])
		f.window = f.buf[:had+n]
	}
	switch {
	case len(f.window) > had:
		return nil
	case f.err == nil:
		return bufio.ErrTooLong
	case errors.Is(f.err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return f.err
}

// find looks for the next delimiter in the window. Without one it returns how many bytes are certainly before it.
func (f *formReader) find() (at int, found bool) {
	for {
		i := bytes.Index(f.window[at:], f.delimiter)
		if i < 0 {
			return max(at, len(f.window)-len(f.delimiter)+1), false
		}
		at += i
		after := at + len(f.delimiter)
		switch {
		case after >= len(f.window): // what follows decides
			return at, false
		case bytes.IndexByte([]byte("-\r \t"), f.window[after]) >= 0:
			return at, true
		}
		at++ // a longer word that only begins like the delimiter
	}
}

// copyTo writes the rest of the current part's content to w.
func (f *formReader) copyTo(w io.Writer) error {
	for {
		n, found := f.find()
		if _, err := w.Write(f.window[:n]); err != nil {
			return err
		}
		f.window = f.window[n:]
		if found {
			return nil
		}
		if err := f.more(); err != nil {
			return &brokenBodyError{err}
		}
	}
}

// brokenBodyError says that the client, not the disk, is at fault.
type brokenBodyError struct{ err error }

func (e *brokenBodyError) Error() string { return "read the upload: " + e.err.Error() }
func (e *brokenBodyError) Unwrap() error { return e.err }

// next goes to the next part and returns its header, or io.EOF after the last.
func (f *formReader) next() (textproto.MIMEHeader, error) {
	if err := f.copyTo(io.Discard); err != nil {
		return nil, err
	}
	f.window = f.window[len(f.delimiter):]
	for {
		if bytes.HasPrefix(f.window, []byte("--")) {
			return nil, io.EOF
		}
		if i := bytes.Index(f.window, []byte("\r\n\r\n")); i >= 0 && i <= maxPartHeader {
			block := f.window[:i+4]
			f.window = f.window[i+4:]
			return partHeader(block)
		}
		if len(f.window) > maxPartHeader {
			return nil, &brokenBodyError{fmt.Errorf("the header of a part is larger than %d bytes", maxPartHeader)}
		}
		if err := f.more(); err != nil {
			return nil, &brokenBodyError{err}
		}
	}
}

// partHeader reads what is between a delimiter and a part's content: padding, a line break, and header lines.
func partHeader(block []byte) (textproto.MIMEHeader, error) {
	padding, lines, _ := bytes.Cut(block, []byte("\r\n"))
	if len(bytes.Trim(padding, " \t")) > 0 {
		return nil, &brokenBodyError{fmt.Errorf("%q follows a delimiter", padding)}
	}
	if bytes.Equal(lines, []byte("\r\n")) {
		return textproto.MIMEHeader{}, nil
	}
	header, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(lines))).ReadMIMEHeader()
	if err != nil {
		return nil, &brokenBodyError{err}
	}
	return header, nil
}
