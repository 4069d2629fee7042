package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
)

// operation is one request on its way.
type operation struct {
	edge    *edge
	request *http.Request
	w       *statusWriter
	pattern string
	id      string
	began   time.Time
	keyID   string
	err     error
}

type operationKey struct{}

func operationOf(r *http.Request) *operation {
	op, _ := r.Context().Value(operationKey{}).(*operation) // begin has put it there
	return op
}

var requestIDForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (e *edge) begin(w http.ResponseWriter, r *http.Request, pattern string) *operation {
	op := &operation{edge: e, w: &statusWriter{ResponseWriter: w}, pattern: pattern, began: time.Now()}
	if op.id = r.Header.Get(exchange.RequestIDHeader); !requestIDForm.MatchString(op.id) {
		op.id = newRequestID()
	}
	w.Header().Set(exchange.RequestIDHeader, op.id)
	op.request = r.WithContext(context.WithValue(r.Context(), operationKey{}, op))
	e.metrics.inFlight.Inc()
	return op
}

func newRequestID() string {
	var raw [8]byte
	_, _ = rand.Read(raw[:]) // never fails: crypto/rand ends the program first
	return hex.EncodeToString(raw[:])
}

// fail answers with an error, unless the answer has begun.
func (op *operation) fail(err error) {
	op.err = err
	if op.w.status == 0 {
		exchange.Fail(op.w, err)
	}
}

// end is deferred: it turns a panic into an answer, counts the request and writes its one line.
func (op *operation) end() {
	if p := recover(); p != nil {
		if p == http.ErrAbortHandler { //nolint:errorlint // a sentinel that is panicked with, not returned
			op.edge.metrics.inFlight.Dec()
			panic(p)
		}
		op.fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
	}
	if op.w.status == 0 {
		op.w.WriteHeader(http.StatusOK)
	}
	op.edge.metrics.inFlight.Dec()
	op.edge.metrics.observe(op)
	op.log()
}

func (op *operation) log() {
	level := slog.LevelDebug
	switch {
	case op.w.status >= http.StatusInternalServerError && exchange.Status(op.err) == http.StatusInternalServerError:
		level = slog.LevelError
	case op.request.Method != http.MethodGet && op.w.status < http.StatusBadRequest:
		level = slog.LevelInfo
	}
	ctx := op.request.Context()
	if !op.edge.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("op", op.route()), slog.Int("status", op.w.status), slog.Duration("took", time.Since(op.began)),
		slog.String("request_id", op.id), slog.String("key_id", op.keyID),
	}
	if id := op.request.PathValue("id"); id != "" {
		attrs = append(attrs, slog.String("id", id))
	}
	if op.err != nil {
		attrs = append(attrs, slog.String("err", op.err.Error()))
	}
	op.edge.log.LogAttrs(ctx, level, "request served", attrs...)
}

// route is the operation's name in logs and metrics; it comes from a closed set.
func (op *operation) route() string {
	if op.pattern == "" {
		return "unmatched"
	}
	return op.pattern
}

// statusWriter remembers what was answered.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController reach the connection.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func statusText(status int) string { return strconv.Itoa(status) }
