package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"syscall"
)

// maxDiscard bounds how much of a refused upload is read and thrown away, so that the client sees the refusal
// instead of a broken connection.
const maxDiscard = 1 << 30

// httpError is an answer that is not 2xx.
type httpError struct {
	status  int
	message string
}

func (e *httpError) Error() string { return e.message }

func httpErrorf(status int, format string, args ...any) *httpError {
	return &httpError{status: status, message: fmt.Sprintf(format, args...)}
}

// statusOf maps an error of the operating system to a status.
func statusOf(err error) int {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return http.StatusNotFound
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return http.StatusInsufficientStorage
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENXIO):
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// writeError answers with the body that every client of the contract expects.
func writeError(w http.ResponseWriter, err error) {
	var known *httpError
	if !errors.As(err, &known) {
		known = &httpError{status: statusOf(err), message: err.Error()}
		if known.status == http.StatusInsufficientStorage {
			known.message = "not enough disk space available: " + known.message
		}
	}
	writeJSON(w, known.status, map[string]any{"code": known.status, "message": known.message})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(body)+1))
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n'))
}

// refuse answers an upload with an error after reading what the client is still sending.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	_, _ = io.CopyN(io.Discard, r.Body, maxDiscard)
	writeError(w, err)
}

// decodeJSON reads a bounded body; an empty one leaves v as it is.
func decodeJSON(w http.ResponseWriter, r *http.Request, limit int64, v any) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			return httpErrorf(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", limit)
		}
		return httpErrorf(http.StatusBadRequest, "read the body: %v", err)
	}
	if len(strings.TrimSpace(string(body))) == 0 {
		return nil
	}
	if err := json.Unmarshal(body, v); err != nil {
		return httpErrorf(http.StatusBadRequest, "the body is not the expected JSON: %v", err)
	}
	return nil
}
