package proxy

import (
	"bytes"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// known is what the requests of a connection have in common, as a rule, kept so that each need not make it anew.
type known struct {
	host, path, id, port string
	ids, ports           [1]string // what they are the only elements of
}

// longestKnown bounds, in bytes, what a connection keeps of each.
const longestKnown = 256

// same returns b as a string, which is kept if it is what the request before had.
func same(kept *string, b []byte) string {
	switch {
	case *kept == string(b):
		return *kept
	case len(b) > longestKnown:
		return string(b)
	}
	*kept = string(b)
	return *kept
}

// askOf returns what routing needs of a request's head, which is good until the connection's next. It says the same as
// headOf says of net/http's.
func askOf(h *h1.Head, k *known) (head, error) {
	q := head{method: methodName(h.Method), fields: h, ids: k.ids[:0], ports: k.ports[:0]}
	if err := setTarget(&q, h, k); err != nil {
		return head{}, err
	}
	for i := range h.Fields {
		switch f := &h.Fields[i]; {
		case h1.Is(f.Name, "e2b-sandbox-id"):
			q.ids = append(q.ids, same(&k.id, f.Value))
		case h1.Is(f.Name, "e2b-sandbox-port"):
			q.ports = append(q.ports, same(&k.port, f.Value))
		}
	}
	if q.method == http.MethodOptions {
		q.preflightMethod = h.Get("Access-Control-Request-Method")
	}
	return q, nil
}

// methodName returns a method's name, of the usual ones without making a string.
func methodName(m []byte) string {
	switch string(m) {
	case http.MethodGet:
		return http.MethodGet
	case http.MethodPost:
		return http.MethodPost
	case http.MethodPut:
		return http.MethodPut
	}
	return string(m)
}

// setTarget fills in host, path and query. A plain path is taken as it is; whatever else a target may be is left to
// net/url, whose view net/http has of it.
func setTarget(q *head, h *h1.Head, k *known) error {
	path, query, _ := bytes.Cut(h.Target, []byte{'?'})
	if plainPath(path) {
		q.host, q.path, q.query = same(&k.host, h.Host), same(&k.path, path), string(query)
		return nil
	}
	u, err := url.ParseRequestURI(string(h.Target))
	if err != nil {
		return sandbox.Invalidf("request target %.80q: want a path that begins with /", h.Target)
	}
	q.host = string(h.Host)
	if u.Host != "" {
		q.host = u.Host
	}
	q.path, q.query = u.EscapedPath(), u.RawQuery
	if q.path == "" && u.Host != "" && u.Opaque == "" {
		q.path = "/"
	}
	if u.Opaque != "" || !strings.HasPrefix(q.path, "/") {
		return sandbox.Invalidf("request target %.80q: want a path that begins with /", h.Target)
	}
	return nil
}

// plainPath reports whether a path begins with a slash and needs no escaping.
func plainPath(path []byte) bool {
	if len(path) == 0 || path[0] != '/' {
		return false
	}
	for i, c := range path {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '%':
			if !escape(path[i:]) {
				return false
			}
		case strings.IndexByte("/-_.~!$&'()*+,;=:@", c) < 0:
			return false
		}
	}
	return true
}

func escape(s []byte) bool {
	if len(s) < 3 {
		return false
	}
	_, high := hexDigit(s[1])
	_, low := hexDigit(s[2])
	return high && low
}

// compose writes into the client's buffer what the guest gets: the head, and what there is of the body.
func (t *transit) compose() error {
	c := t.client
	h := &c.head
	out := append(c.out[:0], t.ask.method...)
	out = append(append(out, ' '), t.dest.path...)
	if bytes.IndexByte(h.Target, '?') >= 0 {
		out = append(append(out, '?'), t.ask.query...)
	}
	out = append(out, " HTTP/1.1\r\n"...)
	if t.ask.host == "" {
		t.ask.host = guestAddr(t.dest.target)
	}
	out = h1.AppendField(out, "Host", t.ask.host) // servers in guests check it
	for i := range h.Fields {
		if f := &h.Fields[i]; !f.Hop && !forwardedField(f.Name) {
			out = h1.AppendField(out, f.Name, f.Value)
		}
	}
	if len(c.host) > 0 {
		out = h1.AppendField(out, "X-Forwarded-For", c.host)
	}
	out = h1.AppendField(out, "X-Forwarded-Host", t.ask.host)
	if c.secure {
		out = append(out, "X-Forwarded-Proto: https\r\n"...)
	} else {
		out = append(out, "X-Forwarded-Proto: http\r\n"...)
	}
	if t.dest.prefix != "" {
		out = h1.AppendField(out, "X-Forwarded-Prefix", t.dest.prefix)
	}
	out = append(t.appendFraming(out), "\r\n"...)
	c.out = out
	if t.body.complete.Load() {
		return nil
	}
	c.lookAway() // what it has read is of the body
	out, used, err := t.body.take(out, c.buf[c.next:c.end])
	c.next += used
	c.out = out
	if t.body.complete.Load() {
		c.lookOut(t)
	}
	return err
}

// forwardedField reports whether a field says where a request came from, which is for the proxy alone to say.
func forwardedField(name []byte) bool {
	switch name[0] {
	case 'X', 'x':
		const prefix = "x-forwarded-"
		return len(name) > len(prefix) && h1.Is(name[:len(prefix)], prefix) || h1.Is(name, "x-real-ip")
	case 'F', 'f':
		return h1.Is(name, "forwarded")
	}
	return false
}

// appendFraming appends the fields that are for the guest's connection alone.
func (t *transit) appendFraming(out []byte) []byte {
	h := &t.client.head
	if h.Trailers {
		out = append(out, "Te: trailers\r\n"...)
	}
	if t.upgrades() {
		out = h1.AppendField(append(out, "Connection: Upgrade\r\n"...), "Upgrade", h.Protocol)
	}
	switch {
	case h.Chunked:
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
		out = appendTrailerNames(out, h)
	case h.Length >= 0:
		out = append(out, "Content-Length: "...)
		out = append(strconv.AppendInt(out, h.Length, 10), "\r\n"...)
	}
	return out
}

func appendTrailerNames(out []byte, h *h1.Head) []byte {
	for i := range h.Fields {
		if f := &h.Fields[i]; h1.Is(f.Name, "trailer") {
			out = h1.AppendField(out, f.Name, f.Value)
		}
	}
	return out
}

// upgrades reports whether the client asks for another protocol and may have it.
func (t *transit) upgrades() bool {
	h := &t.client.head
	return h.Upgrade && len(h.Protocol) > 0 && h.Minor > 0 && !h.Chunked && h.Length <= 0 && mayUpgrade(t.dest.port, string(h.Protocol))
}
