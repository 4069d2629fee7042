package h1

import (
	"bytes"
	"errors"
	"net/http"
)

// ErrIncomplete says that a head has not arrived whole yet.
var ErrIncomplete = errors.New("the head is not complete")

// Field is one field of a head or a trailer. Its slices belong to the buffer that was parsed.
type Field struct {
	Name, Value []byte
	// Hop marks fields that are meant for the next hop alone, by their name or because Connection names them, and
	// those that the framing consists of. Nobody passes them on; whoever writes a head writes its own.
	Hop bool
}

// Head is the head of a message. Parsing again overwrites it; its slices belong to the buffer that was parsed.
type Head struct {
	Method, Target []byte // of a request
	Status         int    // of an answer
	Reason         []byte // likewise
	Minor          int    // x of HTTP/1.x: 0 or 1
	Fields         []Field

	// Length is the value of Content-Length, -1 without one.
	Length int64
	// Chunked means that the body is; Length is then -1.
	Chunked bool
	// Host is the value of Host; HasHost that there is one.
	Host    []byte
	HasHost bool
	// Close, KeepAlive and Upgrade are options of Connection.
	Close, KeepAlive, Upgrade bool
	// Protocol is the value of Upgrade, whether or not Connection names it.
	Protocol []byte
	// Continue means Expect: 100-continue.
	Continue bool
	// Trailers means that TE accepts trailers.
	Trailers bool
	// HasDate means that there is a Date.
	HasDate bool

	answer  bool
	codings int
	lengths int
	named   bool // Connection names fields
}

// Get returns the first value of a field by its name, or nothing.
func (h *Head) Get(name string) string {
	for i := range h.Fields {
		if f := &h.Fields[i]; len(f.Name) == len(name) && bytes.EqualFold(f.Name, []byte(name)) {
			return string(f.Value)
		}
	}
	return ""
}

// Values returns all values of a field by its lower-case name.
func (h *Head) Values(name string) []string {
	var all []string
	for i := range h.Fields {
		if Is(h.Fields[i].Name, name) {
			all = append(all, string(h.Fields[i].Value))
		}
	}
	return all
}

// ParseRequest reads a request's head from the front of buf and returns its length, the empty line included. Errors:
// ErrIncomplete, *Error. Every line must end in CRLF.
func (h *Head) ParseRequest(buf []byte) (int, error) {
	h.reset(false)
	line, n, err := cutLine(buf, true)
	if err != nil {
		return 0, err
	}
	if err := h.requestLine(line); err != nil {
		return 0, err
	}
	used, err := h.fields(buf[n:], true)
	if err != nil {
		return 0, err
	}
	return n + used, h.checkRequest()
}

// ParseAnswer reads an answer's head. Lines may end in LF alone.
func (h *Head) ParseAnswer(buf []byte) (int, error) {
	h.reset(true)
	line, n, err := cutLine(buf, false)
	if err != nil {
		return 0, err
	}
	if err := h.statusLine(line); err != nil {
		return 0, err
	}
	used, err := h.fields(buf[n:], false)
	if err != nil {
		return 0, err
	}
	return n + used, h.checkAnswer()
}

func (h *Head) reset(answer bool) {
	*h = Head{Fields: h.Fields[:0], Length: -1, answer: answer}
}

// cutLine returns the first line without its end, and its length with it.
func cutLine(buf []byte, strict bool) ([]byte, int, error) {
	i := bytes.IndexByte(buf, '\n')
	if i < 0 {
		return nil, 0, ErrIncomplete
	}
	if i > 0 && buf[i-1] == '\r' {
		return buf[:i-1], i + 1, nil
	}
	if strict {
		return nil, 0, refuse(http.StatusBadRequest, "a line ends in LF: want CRLF")
	}
	return buf[:i], i + 1, nil
}

func (h *Head) requestLine(line []byte) error {
	method, rest, ok := bytes.Cut(line, []byte{' '})
	target, version, ok2 := bytes.Cut(rest, []byte{' '})
	if !ok || !ok2 || len(method) == 0 || len(target) == 0 || !all(method, classToken) || !all(target, classTarget) {
		return refuse(http.StatusBadRequest, "request line %.80q: want METHOD TARGET HTTP/1.1", line)
	}
	h.Method, h.Target = method, target
	return h.version(version, http.StatusBadRequest)
}

func (h *Head) version(v []byte, malformed int) error {
	const prefix = "HTTP/"
	if len(v) != len("HTTP/1.1") || string(v[:len(prefix)]) != prefix || !digit(v[5]) || v[6] != '.' || !digit(v[7]) {
		return refuse(malformed, "version %.20q: want HTTP/1.1", v)
	}
	if v[5] != '1' || v[7] > '1' {
		return refuse(http.StatusHTTPVersionNotSupported, "version %.20q: want HTTP/1.1", v)
	}
	h.Minor = int(v[7] - '0')
	return nil
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

func (h *Head) statusLine(line []byte) error {
	version, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok {
		return refuse(http.StatusBadGateway, "status line %.80q: want HTTP/1.1 STATUS REASON", line)
	}
	if err := h.version(version, http.StatusBadGateway); err != nil {
		return err
	}
	code, reason, _ := bytes.Cut(rest, []byte{' '})
	if len(code) != 3 || !digit(code[0]) || !digit(code[1]) || !digit(code[2]) || code[0] == '0' || !all(reason, classValue) {
		return refuse(http.StatusBadGateway, "status line %.80q: want a status from 100 to 999", line)
	}
	h.Status, h.Reason = int(code[0]-'0')*100+int(code[1]-'0')*10+int(code[2]-'0'), reason
	return nil
}

// fields reads lines up to an empty one and returns their length.
func (h *Head) fields(buf []byte, strict bool) (int, error) {
	used := 0
	for {
		line, n, err := cutLine(buf[used:], strict)
		if err != nil {
			return 0, err
		}
		used += n
		if len(line) == 0 {
			break
		}
		if len(h.Fields) == MaxFields {
			return 0, refuse(http.StatusRequestHeaderFieldsTooLarge, "more than %d header fields", MaxFields)
		}
		f, err := parseField(line)
		if err != nil {
			return 0, err
		}
		if err := h.note(&f); err != nil {
			return 0, err
		}
		h.Fields = append(h.Fields, f)
	}
	if h.named {
		h.markNamed()
	}
	return used, nil
}

// parseField reads one line. White space around the name, as in a folded line or before the colon, is refused.
func parseField(line []byte) (Field, error) {
	colon := bytes.IndexByte(line, ':')
	if colon <= 0 || !all(line[:colon], classToken) {
		return Field{}, refuse(http.StatusBadRequest, "header line %.80q: want a name, a colon and a value", line)
	}
	value := trim(line[colon+1:])
	if !all(value, classValue) {
		return Field{}, refuse(http.StatusBadRequest, "header %.80q: a value with a control character", line[:colon])
	}
	return Field{Name: line[:colon], Value: value}, nil
}

// note takes from a field what the framing and the connection need to know.
func (h *Head) note(f *Field) error {
	switch len(f.Name) {
	case len("te"):
		if Is(f.Name, "te") {
			f.Hop = true
			h.Trailers = h.Trailers || hasToken(f.Value, "trailers")
		}
	case len("host"):
		return h.noteHostOrDate(f)
	case len("expect"):
		if Is(f.Name, "expect") {
			return h.noteExpect(f)
		}
	case len("upgrade"):
		h.noteUpgradeOrTrailer(f)
	case len("connection"):
		h.noteConnection(f)
	case len("content-length"):
		if Is(f.Name, "content-length") {
			return h.noteLength(f)
		}
		f.Hop = Is(f.Name, "http2-settings")
	case len("transfer-encoding"):
		if Is(f.Name, "transfer-encoding") {
			return h.noteCoding(f)
		}
	case len("proxy-connection"), len("proxy-authenticate"), len("proxy-authorization"):
		f.Hop = Is(f.Name, "proxy-connection") || Is(f.Name, "proxy-authenticate") || Is(f.Name, "proxy-authorization")
	}
	return nil
}

func (h *Head) noteHostOrDate(f *Field) error {
	if Is(f.Name, "date") {
		h.HasDate = true
	}
	if h.answer || !Is(f.Name, "host") {
		return nil
	}
	f.Hop = true
	if h.HasHost {
		return refuse(http.StatusBadRequest, "two Host headers: want one")
	}
	if !all(f.Value, classHost) {
		return refuse(http.StatusBadRequest, "Host %.80q: want a host name", f.Value)
	}
	h.Host, h.HasHost = f.Value, true
	return nil
}

func (h *Head) noteExpect(f *Field) error {
	if h.answer {
		return nil
	}
	if !Is(f.Value, "100-continue") {
		return refuse(http.StatusExpectationFailed, "Expect %.40q: want 100-continue", f.Value)
	}
	h.Continue = true
	return nil
}

func (h *Head) noteUpgradeOrTrailer(f *Field) {
	switch {
	case Is(f.Name, "upgrade"):
		f.Hop = true
		if h.Protocol == nil {
			h.Protocol = f.Value
		} else {
			h.Protocol = []byte{} // of two nobody knows which one counts
		}
	case Is(f.Name, "trailer"):
		f.Hop = true
	}
}

func (h *Head) noteConnection(f *Field) {
	if Is(f.Name, "keep-alive") {
		f.Hop = true
	}
	if !Is(f.Name, "connection") {
		return
	}
	f.Hop = true
	eachToken(f.Value, func(token []byte) {
		switch {
		case Is(token, "close"):
			h.Close = true
		case Is(token, "keep-alive"):
			h.KeepAlive = true
		case Is(token, "upgrade"):
			h.Upgrade = true
		default:
			h.named = true
		}
	})
}

func (h *Head) noteLength(f *Field) error {
	f.Hop = true
	n, ok := parseLength(f.Value)
	if !ok {
		return refuse(http.StatusBadRequest, "Content-Length %.40q: want a number of bytes", f.Value)
	}
	h.lengths++
	if h.lengths > 1 && (!h.answer || n != h.Length) {
		return refuse(http.StatusBadRequest, "two Content-Length headers: want one")
	}
	h.Length = n
	return nil
}

// parseLength reads a number of digits alone that fits.
func parseLength(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	var n int64
	for _, c := range b {
		if !digit(c) {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

func (h *Head) noteCoding(f *Field) error {
	f.Hop = true
	h.codings++
	if h.codings > 1 || !Is(f.Value, "chunked") {
		return refuse(http.StatusNotImplemented, "Transfer-Encoding %.40q: want chunked, once", f.Value)
	}
	h.Chunked = true
	return nil
}

// markNamed marks the fields that Connection names.
func (h *Head) markNamed() {
	for i := range h.Fields {
		if !Is(h.Fields[i].Name, "connection") {
			continue
		}
		eachToken(h.Fields[i].Value, func(token []byte) {
			for j := range h.Fields {
				if f := &h.Fields[j]; len(f.Name) == len(token) && bytes.EqualFold(f.Name, token) {
					f.Hop = true
				}
			}
		})
	}
}

func (h *Head) checkRequest() error {
	switch {
	case h.Chunked && h.lengths > 0:
		return refuse(http.StatusBadRequest, "both Content-Length and Transfer-Encoding: want one")
	case h.Chunked && h.Minor == 0:
		return refuse(http.StatusBadRequest, "Transfer-Encoding in HTTP/1.0")
	case h.Minor > 0 && !h.HasHost:
		return refuse(http.StatusBadRequest, "no Host header")
	}
	return nil
}

func (h *Head) checkAnswer() error {
	if !h.Chunked {
		return nil
	}
	if h.Minor == 0 {
		return refuse(http.StatusBadGateway, "Transfer-Encoding in HTTP/1.0")
	}
	if h.lengths > 0 { // the coding counts, and the connection is not to be trusted any further
		h.Length, h.Close = -1, true
	}
	return nil
}

// HasBody reports whether the answer has a body, given the method that it answers.
func (h *Head) HasBody(method []byte) bool {
	return h.Status >= http.StatusOK && h.Status != http.StatusNoContent && h.Status != http.StatusNotModified && string(method) != http.MethodHead
}

// eachToken calls f for each element of a list that is not empty.
func eachToken(list []byte, f func([]byte)) {
	for len(list) > 0 {
		var token []byte
		token, list, _ = bytes.Cut(list, []byte{','})
		if token = trim(token); len(token) > 0 {
			f(token)
		}
	}
}

func hasToken(list []byte, name string) (found bool) {
	eachToken(list, func(token []byte) { found = found || Is(token, name) })
	return found
}
