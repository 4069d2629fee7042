package h1

import (
	"bufio"
	"bytes"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

func TestParseRequest(t *testing.T) {
	const host = "Host: a\r\n"
	tests := []struct {
		name, head string
		status     int // of the refusal; 0 for none
	}{
		{"plain", "GET /x?y HTTP/1.1\r\n" + host + "\r\n", 0},
		{"HTTP/1.0 without a host", "GET / HTTP/1.0\r\n\r\n", 0},
		{"absolute target", "GET http://a/b HTTP/1.1\r\n" + host + "\r\n", 0},
		{"odd method", "M-SEARCH * HTTP/1.1\r\n" + host + "\r\n", 0},
		{"empty value", "GET / HTTP/1.1\r\n" + host + "X:\r\n\r\n", 0},
		{"bytes beyond ASCII", "GET /\xe9 HTTP/1.1\r\n" + host + "X: \xff\r\n\r\n", 0},
		{"chunked in capitals", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: CHUNKED\r\n\r\n", 0},

		{"length and coding", "POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		{"coding and length", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400},
		{"unknown coding", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip\r\n\r\n", 501},
		{"two codings in one", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501},
		{"two codings", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 501},
		{"empty coding", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding:\r\n\r\n", 501},
		{"coding with a vertical tab", "POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: \vchunked\r\n\r\n", 400},
		{"coding in HTTP/1.0", "POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", 400},
		{"lengths that differ", "POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400},
		{"the same length twice", "POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nContent-Length: 3\r\n\r\n", 400},
		{"a list of lengths", "POST / HTTP/1.1\r\n" + host + "Content-Length: 3, 3\r\n\r\n", 400},
		{"signed length", "POST / HTTP/1.1\r\n" + host + "Content-Length: +3\r\n\r\n", 400},
		{"negative length", "POST / HTTP/1.1\r\n" + host + "Content-Length: -3\r\n\r\n", 400},
		{"hexadecimal length", "POST / HTTP/1.1\r\n" + host + "Content-Length: 0x3\r\n\r\n", 400},
		{"empty length", "POST / HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\n", 400},
		{"length beyond all", "POST / HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999\r\n\r\n", 400},
		{"space before the colon", "GET / HTTP/1.1\r\n" + host + "X : a\r\n\r\n", 400},
		{"tab before the colon", "GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", 400},
		{"no name", "GET / HTTP/1.1\r\n" + host + ": a\r\n\r\n", 400},
		{"no colon", "GET / HTTP/1.1\r\n" + host + "X\r\n\r\n", 400},
		{"folded", "GET / HTTP/1.1\r\n" + host + "X: a\r\n b\r\n\r\n", 400},
		{"folded at once", "GET / HTTP/1.1\r\n X: a\r\n" + host + "\r\n", 400},
		{"two hosts", "GET / HTTP/1.1\r\n" + host + host + "\r\n", 400},
		{"no host", "GET / HTTP/1.1\r\nX: a\r\n\r\n", 400},
		{"host with a slash", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400},
		{"host with a space", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400},
		{"bare LF", "GET / HTTP/1.1\nHost: a\n\n", 400},
		{"bare LF at the end", "GET / HTTP/1.1\r\nHost: a\r\n\n", 400},
		{"LF within a value", "GET / HTTP/1.1\r\nHost: a\r\nX: a\nY: b\r\n\r\n", 400},
		{"CR within a value", "GET / HTTP/1.1\r\nHost: a\r\nX: a\rY: b\r\n\r\n", 400},
		{"NUL", "GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400},
		{"two spaces", "GET  / HTTP/1.1\r\n" + host + "\r\n", 400},
		{"a space in the target", "GET /a b HTTP/1.1\r\n" + host + "\r\n", 400},
		{"a tab in the target", "GET /a\tb HTTP/1.1\r\n" + host + "\r\n", 400},
		{"a space in front", " GET / HTTP/1.1\r\n" + host + "\r\n", 400},
		{"method with a colon", "G:T / HTTP/1.1\r\n" + host + "\r\n", 400},
		{"no version", "GET /\r\n" + host + "\r\n", 400},
		{"lower-case version", "GET / http/1.1\r\n" + host + "\r\n", 400},
		{"long version", "GET / HTTP/1.10\r\n" + host + "\r\n", 400},
		{"HTTP/2.0", "GET / HTTP/2.0\r\n" + host + "\r\n", 505},
		{"HTTP/1.2", "GET / HTTP/1.2\r\n" + host + "\r\n", 505},
		{"unknown expectation", "GET / HTTP/1.1\r\n" + host + "Expect: much\r\n\r\n", 417},
		{"too many fields", "GET / HTTP/1.1\r\n" + host + strings.Repeat("a: b\r\n", MaxFields) + "\r\n", 431},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var h Head
			n, err := h.ParseRequest([]byte(tt.head + "rest"))
			var refused *Error
			switch {
			case tt.status == 0:
				if err != nil || n != len(tt.head) {
					t.Errorf("%d bytes, %v; want %d", n, err, len(tt.head))
				}
			case !errors.As(err, &refused) || refused.Status != tt.status:
				t.Errorf("error %v, want one with status %d", err, tt.status)
			}
		})
	}
}

func TestHopByHop(t *testing.T) {
	const head = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-One,,\tupgrade\r\nX-One: 1\r\nx-two: 2\r\nConnection: X-TWO\r\nKeep-Alive: 1\r\n" +
		"Te: gzip, trailers\r\nTrailer: X\r\nUpgrade: websocket\r\nProxy-Connection: a\r\nProxy-Authorization: b\r\nProxy-Authenticate: c\r\n" +
		"HTTP2-Settings: d\r\nX-Kept: 3\r\nContent-Length: 0\r\n\r\n"
	var h Head
	if _, err := h.ParseRequest([]byte(head)); err != nil {
		t.Fatal(err)
	}
	if got, want := string(AppendFields(nil, h.Fields)), "X-Kept: 3\r\n"; got != want {
		t.Errorf("passed on: %q, want %q", got, want)
	}
	if !h.Close || !h.Upgrade || h.KeepAlive || !h.Trailers || string(h.Protocol) != "websocket" || h.Length != 0 {
		t.Errorf("%+v", h)
	}
}

func TestParseAnswer(t *testing.T) {
	tests := []struct {
		name, head string
		ok         bool
		want       Head
	}{
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", true, Head{Status: 200, Minor: 1, Length: 3}},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 3\n\n", true, Head{Status: 200, Minor: 1, Length: 3}},
		{"no reason", "HTTP/1.0 404\r\n\r\n", true, Head{Status: 404, Length: -1}},
		{"the same length twice", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", true, Head{Status: 200, Minor: 1, Length: 3}},
		{"length and coding", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", true, Head{Status: 200, Minor: 1, Length: -1, Chunked: true, Close: true}},
		{"lengths that differ", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", false, Head{}},
		{"unknown coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", false, Head{}},
		{"coding in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", false, Head{}},
		{"status of two digits", "HTTP/1.1 20 OK\r\n\r\n", false, Head{}},
		{"signed status", "HTTP/1.1 +20 OK\r\n\r\n", false, Head{}},
		{"status zero", "HTTP/1.1 000 OK\r\n\r\n", false, Head{}},
		{"control character in the reason", "HTTP/1.1 200 O\x01K\r\n\r\n", false, Head{}},
		{"space before the colon", "HTTP/1.1 200 OK\r\nX : a\r\n\r\n", false, Head{}},
		{"SSH", "SSH-2.0-OpenSSH_9.2\r\n\r\n", false, Head{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var h Head
			n, err := h.ParseAnswer([]byte(tt.head))
			if (err == nil) != tt.ok {
				t.Fatalf("%d bytes, %v", n, err)
			}
			if tt.ok && (h.Status != tt.want.Status || h.Minor != tt.want.Minor || h.Length != tt.want.Length || h.Chunked != tt.want.Chunked || h.Close != tt.want.Close) {
				t.Errorf("%+v, want %+v", h, tt.want)
			}
		})
	}
}

func TestHeadArrivesInPieces(t *testing.T) {
	const head = "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n\r\n"
	for n := range len(head) {
		var h Head
		if _, err := h.ParseRequest([]byte(head[:n])); !errors.Is(err, ErrIncomplete) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// FuzzRequest compares with net/http: what both take means the same, and what net/http refuses is refused.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST /a?b HTTP/1.1\r\nHost: a:1\r\nContent-Length: 3\r\n\r\nabc", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"GET http://b/c HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: [::1]\r\nConnection: close, x\r\n\r\n",
		"GET //x/%zz HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "GET / HTTP/1.1\r\nHost:\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
		"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nX: \"\\\"\r\n\r\n", "PRI * HTTP/2.0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var h Head
		n, err := h.ParseRequest(in)
		if err != nil {
			return // stricter is fine
		}
		theirs, theirErr := http.ReadRequest(bufio.NewReader(bytes.NewReader(in)))
		if theirErr != nil {
			// net/http also parses the target, which is left to whoever routes by it.
			if target := string(h.Target); badTarget(target) || string(h.Method) == http.MethodConnect {
				return
			}
			t.Fatalf("%q: taken, but not by net/http: %v", in[:n], theirErr)
		}
		defer func() { _ = theirs.Body.Close() }()
		same(t, in[:n], &h, theirs)
	})
}

func badTarget(target string) bool {
	_, err := url.ParseRequestURI(target)
	return err != nil
}

func same(t *testing.T, in []byte, h *Head, theirs *http.Request) {
	t.Helper()
	if string(h.Method) != theirs.Method || string(h.Target) != theirs.RequestURI || h.Minor != theirs.ProtoMinor || theirs.ProtoMajor != 1 {
		t.Fatalf("%q: %s %s 1.%d, net/http: %s %s %s", in, h.Method, h.Target, h.Minor, theirs.Method, theirs.RequestURI, theirs.Proto)
	}
	if theirs.URL.Host == "" && string(h.Host) != theirs.Host {
		t.Fatalf("%q: host %q, net/http: %q", in, h.Host, theirs.Host)
	}
	chunked := len(theirs.TransferEncoding) == 1 && theirs.TransferEncoding[0] == "chunked"
	if h.Chunked != chunked || !chunked && max(h.Length, 0) != theirs.ContentLength {
		t.Fatalf("%q: length %d, chunked %v, net/http: %d %v", in, h.Length, h.Chunked, theirs.ContentLength, theirs.TransferEncoding)
	}
	seen := make(http.Header)
	for _, f := range h.Fields {
		seen.Add(string(f.Name), string(f.Value))
	}
	for name, values := range theirs.Header {
		if name == "Cache-Control" && len(seen[name]) == 0 {
			continue // made of Pragma
		}
		if len(seen[name]) != len(values) {
			t.Fatalf("%q: %s is %q, net/http: %q", in, name, seen[name], values)
		}
		for i := range values {
			if values[i] != seen[name][i] {
				t.Fatalf("%q: %s is %q, net/http: %q", in, name, seen[name], values)
			}
		}
	}
}

// FuzzAnswer: what is taken is taken by net/http too, with the same framing.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HTTP/1.1 204 \r\n\r\n", "HTTP/1.0 301 Moved\r\nLocation: /\r\n\r\n", "HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 200 OK\nX: y\n\n", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var h Head
		n, err := h.ParseAnswer(in)
		if err != nil {
			return
		}
		theirs, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(in)), &http.Request{Method: http.MethodGet})
		if err != nil {
			t.Fatalf("%q: taken, but not by net/http: %v", in[:n], err)
		}
		defer func() { _ = theirs.Body.Close() }()
		length := int64(-1)
		if h.Length >= 0 {
			length = h.Length
		}
		if !h.HasBody([]byte(http.MethodGet)) {
			length = 0
		}
		if h.Status != theirs.StatusCode || h.HasBody([]byte(http.MethodGet)) && (length != theirs.ContentLength || h.Chunked != (len(theirs.TransferEncoding) > 0)) {
			t.Fatalf("%q: %d length %d chunked %v, net/http: %d %d %v", in[:n], h.Status, length, h.Chunked, theirs.StatusCode, theirs.ContentLength, theirs.TransferEncoding)
		}
	})
}
