package h1

import (
	"net/http"
	"strconv"
)

// Chunks takes the chunked coding off a body, piece by piece. The zero value is ready.
type Chunks struct {
	state   chunkState
	left    int64 // of the chunk's data
	line    int   // bytes of the size line so far
	digits  int
	trailer []byte
	head    Head
}

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkPad             // white space after the size
	chunkExtension
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	chunkTrailer
	chunkDone
)

// Reset makes the value ready for another body.
func (c *Chunks) Reset() { *c = Chunks{trailer: c.trailer[:0], head: Head{Fields: c.head.Fields[:0]}} }

// Done reports whether the body and its trailer have ended.
func (c *Chunks) Done() bool { return c.state == chunkDone }

// Trailer returns the fields after the last chunk, once Done. Fields that would say something of the message's framing,
// its route or its connection are marked as Hop.
func (c *Chunks) Trailer() []Field { return c.head.Fields }

// Next returns the next piece of data at the front of in, part of in itself, and how many bytes of in it has gone
// through for it. No data means that in is used up, or that the body is done: what is left belongs to the next message.
// Errors: *Error.
func (c *Chunks) Next(in []byte) (data []byte, used int, err error) {
	for used < len(in) && c.state != chunkDone {
		if c.state == chunkData {
			n := int(min(c.left, int64(len(in)-used)))
			c.left -= int64(n)
			if c.left == 0 {
				c.state = chunkDataCR
			}
			return in[used : used+n], used + n, nil
		}
		if c.state == chunkTrailer {
			err = c.addTrailer(in[used])
		} else {
			err = c.step(in[used])
		}
		if err != nil {
			return nil, used, err
		}
		used++
	}
	return nil, used, nil
}

// step takes one byte that is neither data nor trailer.
func (c *Chunks) step(b byte) error {
	switch c.state { //nolint:exhaustive // data and trailer are not bytes of their own; all others belong to the size's line
	case chunkDataCR:
		if b != '\r' {
			return badChunk("data that is longer than its size")
		}
		c.state = chunkDataLF
		return nil
	case chunkDataLF:
		if b != '\n' {
			return badChunk("CR without LF after data")
		}
		c.state, c.left, c.line, c.digits = chunkSize, 0, 0, 0
		return nil
	case chunkSizeLF:
		return c.endSize(b)
	default:
		return c.sizeLine(b)
	}
}

func (c *Chunks) sizeLine(b byte) error {
	if c.line++; c.line > maxChunkLine {
		return badChunk("size line of more than 256 bytes")
	}
	if b == '\r' {
		if c.digits == 0 {
			return badChunk("no size")
		}
		c.state = chunkSizeLF
		return nil
	}
	switch v, ok := hex(b); {
	case c.state == chunkExtension:
		if classes[b]&classValue == 0 {
			return badChunk("control character in an extension")
		}
	case c.state == chunkSize && ok:
		if c.digits++; c.digits > 15 {
			return badChunk("size of more than 15 digits")
		}
		c.left = c.left<<4 | int64(v)
	case c.digits > 0 && (b == ' ' || b == '\t'):
		c.state = chunkPad
	case c.digits > 0 && b == ';':
		c.state = chunkExtension
	default:
		return badChunk("size that is no hexadecimal number")
	}
	return nil
}

func (c *Chunks) endSize(b byte) error {
	if b != '\n' {
		return badChunk("CR without LF after a size")
	}
	c.state = chunkData
	if c.left == 0 {
		c.state = chunkTrailer
	}
	return nil
}

func hex(b byte) (byte, bool) {
	switch {
	case '0' <= b && b <= '9':
		return b - '0', true
	case 'a' <= b && b <= 'f':
		return b - 'a' + 10, true
	case 'A' <= b && b <= 'F':
		return b - 'A' + 10, true
	}
	return 0, false
}

func badChunk(what string) error {
	return refuse(http.StatusBadRequest, "chunked body: %s", what)
}

// addTrailer collects the trailer up to its empty line, then reads it.
func (c *Chunks) addTrailer(b byte) error {
	if len(c.trailer) == MaxTrailerBytes {
		return refuse(http.StatusRequestHeaderFieldsTooLarge, "trailer of more than %d bytes", MaxTrailerBytes)
	}
	c.trailer = append(c.trailer, b)
	n := len(c.trailer)
	if b != '\n' {
		return nil
	}
	if n < 2 || c.trailer[n-2] != '\r' {
		return badChunk("a trailer's line ends in LF: want CRLF")
	}
	if n > 2 && (n < 4 || c.trailer[n-3] != '\n') {
		return nil
	}
	c.head.reset(true)
	if err := c.readTrailer(); err != nil {
		return err
	}
	c.state = chunkDone
	return nil
}

func (c *Chunks) readTrailer() error {
	for rest := c.trailer; ; {
		line, n, err := cutLine(rest, true)
		if err != nil || len(line) == 0 {
			return err
		}
		rest = rest[n:]
		f, err := parseField(line)
		if err != nil {
			return err
		}
		if len(c.head.Fields) == MaxFields {
			return refuse(http.StatusRequestHeaderFieldsTooLarge, "more than %d trailer fields", MaxFields)
		}
		f.Hop = !mayTrail(f.Name)
		c.head.Fields = append(c.head.Fields, f)
	}
}

// mayTrail reports whether a field may come after a body; RFC 9110 6.5.1 says which may not, here those that matter to a
// proxy or to what is behind it.
func mayTrail(name []byte) bool {
	for _, no := range []string{
		"content-length", "transfer-encoding", "host", "trailer", "connection", "keep-alive", "upgrade", "te", "expect", "authorization",
		"content-encoding", "content-type", "content-range", "cookie", "set-cookie", "proxy-connection", "proxy-authenticate", "proxy-authorization",
		"forwarded", "x-real-ip", "e2b-sandbox-id", "e2b-sandbox-port", "x-access-token",
	} {
		if Is(name, no) {
			return false
		}
	}
	return len(name) < len("x-forwarded-") || !Is(name[:len("x-forwarded-")], "x-forwarded-")
}

// AppendChunk appends data as one chunk. Empty data appends nothing, since an empty chunk is the last.
func AppendChunk(out, data []byte) []byte {
	if len(data) == 0 {
		return out
	}
	out = strconv.AppendInt(out, int64(len(data)), 16)
	out = append(out, "\r\n"...)
	out = append(out, data...)
	return append(out, "\r\n"...)
}

// AppendEnd appends the last chunk and the trailer.
func AppendEnd(out []byte, trailer []Field) []byte {
	out = append(out, "0\r\n"...)
	return append(AppendFields(out, trailer), "\r\n"...)
}

// AppendFields appends fields that are not marked as Hop.
func AppendFields(out []byte, fields []Field) []byte {
	for i := range fields {
		if !fields[i].Hop {
			out = AppendField(out, fields[i].Name, fields[i].Value)
		}
	}
	return out
}

// AppendField appends one field.
func AppendField[N, V ~string | ~[]byte](out []byte, name N, value V) []byte {
	out = append(out, name...)
	out = append(out, ": "...)
	out = append(out, value...)
	return append(out, "\r\n"...)
}
