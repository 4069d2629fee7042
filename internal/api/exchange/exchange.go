package exchange

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"strconv"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Handler answers one request. It writes an answer and returns nil, or writes nothing and returns why.
type Handler func(w http.ResponseWriter, r *http.Request) error

// Route is one operation.
type Route struct {
	// Method and Path are as in http.ServeMux.
	Method string
	Path   string
	Handle Handler
	// Public needs no key.
	Public bool
}

// Pattern is the route as http.ServeMux wants it.
func (r Route) Pattern() string { return r.Method + " " + r.Path }

// MaxBody is the largest body that is read, in bytes.
const MaxBody = 1 << 20

// bodyTimeout is how long a client may take to send a body, which is small.
const bodyTimeout = 30 * time.Second

// readBody reads a body of bounded size in bounded time.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	conn := http.NewResponseController(w)
	_ = conn.SetReadDeadline(time.Now().Add(bodyTimeout)) // what is no connection does not make one wait either
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, fmt.Errorf("%w: want at most %d bytes", errTooLarge, tooLarge.Limit)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, fmt.Errorf("%w: %d bytes of it came in %v", errTooSlow, len(body), bodyTimeout)
	}
	if err != nil {
		return nil, sandbox.Invalidf("the body could not be read: %v", err)
	}
	_ = conn.SetReadDeadline(time.Time{}) // as above
	return body, nil
}

// Read decodes a JSON body into v. Unknown fields are ignored, because newer clients send them.
func Read(w http.ResponseWriter, r *http.Request, v any) error {
	found, err := ReadOptional(w, r, v)
	if err == nil && !found {
		return sandbox.Invalidf("the body is empty: want a JSON object")
	}
	return err
}

// ReadOptional is Read for a body that may be missing; it reports whether there was one.
func ReadOptional(w http.ResponseWriter, r *http.Request, v any) (bool, error) {
	body, err := readBody(w, r)
	if err != nil {
		return false, err
	}
	body = bytes.TrimSpace(body)
	if len(body) == 0 {
		return false, nil
	}
	if body[0] != '{' {
		return false, sandbox.Invalidf("the body begins with %.20q: want a JSON object", body)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return false, explain(err)
	}
	return true, nil
}

// explain says what is wrong with a body, in its own words rather than in Go's.
func explain(err error) error {
	if wrongType, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return sandbox.Invalidf("field %q is a %s: want %s", wrongType.Field, wrongType.Value, wanted(wrongType.Type))
	}
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		return sandbox.Invalidf("the body is not JSON, at byte %d: %v", syntax.Offset, err)
	}
	return sandbox.Invalidf("the body is not JSON: %v", err)
}

//nolint:exhaustive // the rest do not appear in bodies
func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Int, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	case reflect.String:
		return "a text"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice, reflect.Array:
		return "a list"
	}
	return "an object"
}

// JSON writes an answer with its length, so that it is never chunked.
func JSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	return Bytes(w, status, "application/json", append(body, '\n'))
}

// Bytes writes an answer that is encoded already.
func Bytes(w http.ResponseWriter, status int, contentType string, body []byte) error {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body) // a caller that went away needs no answer
	return nil
}

// Empty writes 204.
func Empty(w http.ResponseWriter) error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// Query returns a request's query, or ErrInvalid; http.Request.URL.Query drops what it cannot read.
func Query(r *http.Request) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, sandbox.Invalidf("query %.80q: %v", r.URL.RawQuery, err)
	}
	return q, nil
}

// Int reads a whole number from the query, or returns the default where there is none.
func Int(q url.Values, name string, least, most, byDefault int64) (int64, error) {
	text := q.Get(name)
	if text == "" {
		return byDefault, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < least || n > most {
		return 0, sandbox.Invalidf("%s %.40q: want a whole number from %d to %d", name, text, least, most)
	}
	return n, nil
}

// lastSecond is the end of the year 9999, the last that the formats here can write.
const lastSecond = 253_402_300_799

// UnixTime reads a time from the query as a number of units since 1970; it is zero where there is none.
func UnixTime(q url.Values, name string, unit time.Duration) (time.Time, error) {
	perSecond := int64(time.Second / unit)
	n, err := Int(q, name, 0, lastSecond*perSecond, -1)
	if err != nil || n < 0 {
		return time.Time{}, err
	}
	return time.Unix(n/perSecond, n%perSecond*int64(unit)).UTC(), nil
}

// Time reads an RFC 3339 time from the query; it is zero where there is none.
func Time(q url.Values, name string) (time.Time, error) {
	text := q.Get(name)
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return time.Time{}, sandbox.Invalidf("%s %.40q: want a time as in 2025-01-31T12:00:00Z", name, text)
	}
	return t.UTC(), nil
}

// Seconds turns a number from a body into a duration without overflow; its bounds are for the operation to check.
func Seconds(name string, n int64) (time.Duration, error) {
	if n > math.MaxInt32 || n < math.MinInt32 {
		return 0, sandbox.Invalidf("%s %d: want at most %d seconds", name, n, math.MaxInt32)
	}
	return time.Duration(n) * time.Second, nil
}
