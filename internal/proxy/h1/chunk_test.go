package h1

import (
	"bytes"
	"errors"
	"io"
	"net/http/httputil"
	"strings"
	"testing"
)

// decoded is a body without its coding, and what came after it.
type decoded struct {
	Chunks
	data, rest []byte
}

// decode feeds a body in pieces of n bytes.
func decode(in []byte, n int) (got decoded, err error) {
	c := &got.Chunks
	for len(in) > 0 && !c.Done() {
		piece := in[:min(n, len(in))]
		for len(piece) > 0 && !c.Done() {
			d, used, err := c.Next(piece)
			if err != nil {
				return got, err
			}
			got.data = append(got.data, d...)
			piece, in = piece[used:], in[used:]
		}
	}
	got.rest = in
	return got, nil
}

func TestChunks(t *testing.T) {
	const body = "5\r\nhello\r\n1;ext=\"a\"\r\n \r\n00005 \t\r\nworld\r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\nX-Forwarded-For: 6.6.6.6\r\nE2b-Sandbox-Id: x\r\n\r\nGET /"
	for n := 1; n < len(body)+1; n++ {
		c, err := decode([]byte(body), n)
		if err != nil || string(c.data) != "hello world" || string(c.rest) != "GET /" || !c.Done() {
			t.Fatalf("in pieces of %d: %q, rest %q, %v", n, c.data, c.rest, err)
		}
		if got := string(AppendEnd(nil, c.Trailer())); got != "0\r\nX-Sum: 1\r\n\r\n" {
			t.Fatalf("trailer: %q", got)
		}
	}
}

func TestBadChunks(t *testing.T) {
	for name, body := range map[string]string{
		"no size":                 "\r\nhello\r\n",
		"sign":                    "+5\r\nhello\r\n",
		"negative":                "-1\r\n",
		"prefix":                  "0x5\r\nhello\r\n",
		"space in front":          " 5\r\nhello\r\n",
		"digits after a space":    "5 5\r\nhello\r\n",
		"too long a size":         "1000000000000000\r\n",
		"LF after a size":         "5\nhello\r\n",
		"LF after an extension":   "5;a\nhello\r\n",
		"CR alone after a size":   "5\rhello\r\n",
		"data beyond its size":    "5\r\nhello!\r\n",
		"LF after data":           "5\r\nhello\n0\r\n\r\n",
		"endless extension":       "5;" + strings.Repeat("x", maxChunkLine) + "\r\n",
		"LF in the trailer":       "0\r\nX: y\n\r\n",
		"bad trailer":             "0\r\nX : y\r\n\r\n",
		"folded trailer":          "0\r\nX: y\r\n z\r\n\r\n",
		"endless trailer":         "0\r\nX: " + strings.Repeat("x", MaxTrailerBytes) + "\r\n\r\n",
		"trailer of many fields":  "0\r\n" + strings.Repeat("a: b\r\n", MaxFields+1) + "\r\n",
		"NUL in an extension":     "5;\x00\r\nhello\r\n",
		"extension without digit": ";a\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := decode([]byte(body), len(body))
			var bad *Error
			if !errors.As(err, &bad) || c.Done() {
				t.Errorf("%q %v, want a refusal", c.data, err)
			}
		})
	}
}

func TestAppendChunk(t *testing.T) {
	out := AppendChunk(nil, nil)
	for _, s := range []string{"a", strings.Repeat("b", 300)} {
		out = AppendChunk(out, []byte(s))
	}
	got, err := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(AppendEnd(out, nil))))
	if err != nil || len(got) != 301 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// FuzzChunks: what is taken whole is taken by net/http's reader too, with the same data, however it arrives.
func FuzzChunks(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\n"), 3)
	f.Add([]byte("1;a=b\r\nx\r\n0\r\nX: y\r\n\r\nmore"), 1)
	f.Add([]byte("5 \r\nhello\r\n00\r\n\r\n"), 100)
	f.Fuzz(func(t *testing.T, in []byte, n int) {
		c, err := decode(in, max(n, 1))
		whole, wholeErr := decode(in, len(in)+1)
		if (err == nil) != (wholeErr == nil) || err == nil && (!bytes.Equal(c.data, whole.data) || !bytes.Equal(c.rest, whole.rest)) {
			t.Fatalf("%q: in pieces %q %v, at once %q %v", in, c.data, err, whole.data, wholeErr)
		}
		if err != nil || !c.Done() {
			return
		}
		theirs, err := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(in)))
		if err != nil || !bytes.Equal(theirs, c.data) {
			t.Fatalf("%q: %q, net/http: %q %v", in, c.data, theirs, err)
		}
	})
}
