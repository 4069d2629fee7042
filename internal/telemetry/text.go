package telemetry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

// textHandler writes lines for a person at a terminal: the time of day, a level of three letters, the message, then
// key=value pairs. slog's own text handler writes the pairs, into a buffer that all handlers of one logger share.
type textHandler struct {
	pairs slog.Handler
	out   *textOutput
}

// textOutput is where lines go. mu guards buf and keeps lines whole.
type textOutput struct {
	mu  sync.Mutex
	w   io.Writer
	buf bytes.Buffer
}

func newTextHandler(w io.Writer, level slog.Level) *textHandler {
	out := &textOutput{w: w}
	replace := func(groups []string, a slog.Attr) slog.Attr {
		_, isLevel := a.Value.Any().(slog.Level)
		if len(groups) == 0 && (isLevel || a.Key == slog.MessageKey && a.Value.String() == "") {
			return slog.Attr{} // the record's own, written already
		}
		return redact(groups, a)
	}
	return &textHandler{pairs: slog.NewTextHandler(&out.buf, &slog.HandlerOptions{Level: level, ReplaceAttr: replace}), out: out}
}

// Enabled implements slog.Handler.
func (h *textHandler) Enabled(ctx context.Context, l slog.Level) bool { return h.pairs.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (h *textHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &textHandler{pairs: h.pairs.WithAttrs(attrs), out: h.out}
}

// WithGroup implements slog.Handler.
func (h *textHandler) WithGroup(name string) slog.Handler {
	return &textHandler{pairs: h.pairs.WithGroup(name), out: h.out}
}

// Handle implements slog.Handler.
func (h *textHandler) Handle(ctx context.Context, r slog.Record) error {
	message := apiKey.ReplaceAllString(r.Message, hidden)
	if strings.ContainsFunc(message, unicode.IsControl) {
		message = strconv.Quote(message)
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	h.out.buf.Reset()
	fmt.Fprintf(&h.out.buf, "%s %s %s ", r.Time.Format("15:04:05.000"), shortLevel(r.Level), message)
	r.Time, r.Message = time.Time{}, "" // slog's handler leaves a zero time out, and replace an empty message
	if err := h.pairs.Handle(ctx, r); err != nil {
		return fmt.Errorf("format log line: %w", err)
	}
	line := append(bytes.TrimRight(h.out.buf.Bytes(), " \n"), '\n') // fits: a newline was there before
	if _, err := h.out.w.Write(line); err != nil {
		return fmt.Errorf("write log line: %w", err)
	}
	return nil
}

// shortLevel returns a level as three letters.
func shortLevel(l slog.Level) string {
	switch {
	case l < slog.LevelInfo:
		return "DBG"
	case l < slog.LevelWarn:
		return "INF"
	case l < slog.LevelError:
		return "WRN"
	}
	return "ERR"
}
