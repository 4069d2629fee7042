package exchange

import (
	"context"
	"errors"
	"net/http"
	"strconv"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// errTooLarge is a body beyond the limit; it has its own status and is no kind of the domain.
var errTooLarge = errors.New("body too large")

// errTooSlow is a body that did not come in time; as above.
var errTooSlow = errors.New("body too slow")

// ErrUnauthenticated means that the caller has not shown a key that opens this.
var ErrUnauthenticated = errors.New("unauthenticated")

// statusOfKind is the one table from kinds of error to HTTP. A lack of room is 503 and not 429, which the SDKs explain
// to people as a rate limit.
//
//nolint:gochecknoglobals // a table, never written
var statusOfKind = []struct {
	kind   error
	status int
}{
	{ErrUnauthenticated, http.StatusUnauthorized},
	{errTooLarge, http.StatusRequestEntityTooLarge},
	{errTooSlow, http.StatusRequestTimeout},
	{sandbox.ErrInvalid, http.StatusBadRequest},
	{sandbox.ErrNotFound, http.StatusNotFound},
	{sandbox.ErrConflict, http.StatusConflict},
	{sandbox.ErrDenied, http.StatusForbidden},
	{sandbox.ErrUnsupported, http.StatusNotImplemented},
	{sandbox.ErrExhausted, http.StatusServiceUnavailable},
	{sandbox.ErrUnavailable, http.StatusServiceUnavailable},
	{context.DeadlineExceeded, http.StatusServiceUnavailable},
	{context.Canceled, statusClientClosed},
}

// statusClientClosed is for the log alone: nobody reads the answer.
const statusClientClosed = 499

// retrySeconds is when a client may try again after a 503.
const retrySeconds = 1

// Status returns the HTTP status of an error; 500 is a mistake of ours.
func Status(err error) int {
	for _, k := range statusOfKind {
		if errors.Is(err, k.kind) {
			return k.status
		}
	}
	return http.StatusInternalServerError
}

// failure is the body of every answer that is not 2xx. The SDKs look at code as well as at the status.
type failure struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// Message is what a caller is told of an error. What went wrong inside is for the log.
func Message(err error) string {
	if Status(err) == http.StatusInternalServerError {
		return "internal error; the server's log says more"
	}
	return err.Error()
}

// Fail writes an error. What went wrong inside is for the log: the caller gets its request's id to ask with.
func Fail(w http.ResponseWriter, err error) int {
	status := Status(err)
	message := err.Error()
	if status == http.StatusInternalServerError {
		message = "internal error; the server's log says more under request " + w.Header().Get(RequestIDHeader)
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa(retrySeconds))
	}
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="cloister"`)
	}
	FailWith(w, status, message)
	return status
}

// FailWith writes an error with a status of its own.
func FailWith(w http.ResponseWriter, status int, message string) {
	_ = JSON(w, status, failure{Code: status, Message: message}) // a failure is always encodable
}

// RequestIDHeader names a request, in the answer and in the log.
const RequestIDHeader = "X-Request-Id"
