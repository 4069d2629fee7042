package proxy

import (
	"net/http"
	"strconv"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
)

// recorder takes an answer that is made for net/http.
type recorder struct {
	header http.Header
	status int
	body   []byte
}

// Header returns the fields of the answer.
func (r *recorder) Header() http.Header { return r.header }

// WriteHeader takes the status.
func (r *recorder) WriteHeader(status int) { r.status = status }

// Write takes some of the body.
func (r *recorder) Write(p []byte) (int, error) {
	r.body = append(r.body, p...)
	return len(p), nil
}

// writeFailure answers the current request in a guest's stead.
func (c *clientConn) writeFailure(f *failure, keep bool) {
	h := &c.head
	request := &http.Request{Method: string(h.Method), Host: string(h.Host), Header: make(http.Header, len(h.Fields))}
	for i := range h.Fields {
		request.Header.Add(string(h.Fields[i].Name), string(h.Fields[i].Value))
	}
	rec := recorder{header: make(http.Header), status: http.StatusOK}
	f.write(&rec, request)
	answer := h1.Head{Status: rec.status, Reason: []byte(http.StatusText(rec.status))}
	out := appendDate(appendStatus(c.out[:0], &answer))
	if rec.status != http.StatusNoContent && rec.header.Get("Content-Length") == "" {
		rec.header.Set("Content-Length", strconv.Itoa(len(rec.body)))
	}
	for name, values := range rec.header {
		for _, v := range values {
			out = h1.AppendField(out, name, headerValue(v))
		}
	}
	out = append(appendConnection(out, h, keep), "\r\n"...)
	if request.Method != http.MethodHead {
		out = append(out, rec.body...)
	}
	_, _ = c.conn.Write(out) // a client that has left needs no answer
}

// headerValue keeps a value on its line.
func headerValue(v string) string {
	for i := range len(v) {
		if v[i] < ' ' || v[i] == 0x7f {
			return strconv.QuoteToASCII(v)
		}
	}
	return v
}
