// Package telemetry makes what the other parts are handed to tell what they do: a logger that hides secrets, a metrics
// registry, the debug endpoints, and tracing.
//
// It keeps no global state of its own but OpenTelemetry's tracer provider, which StartTracing sets, and starts no
// goroutines but those of that provider. Everything that it returns is safe for concurrent use.
package telemetry

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"strings"

	"golang.org/x/term"
)

// Logging says where the log goes and what of it.
type Logging struct {
	Writer io.Writer
	// Level is debug, info, warn or error; empty means info.
	Level string
	// Format is text, json, or auto: text on a terminal, else JSON. Empty means auto. Text is shorter on a terminal.
	Format string
}

// hidden stands for a secret in the log.
const hidden = "[redacted]"

// apiKey is what an API key looks like, wherever it turns up.
var apiKey = regexp.MustCompile(`e2b_[0-9a-fA-F]{8,}`)

// NewLogger returns a logger that hides secrets: attributes whose keys name one, and API keys in any text. Errors: a level
// or format that is not one.
func NewLogger(l Logging) (*slog.Logger, error) {
	level := slog.LevelInfo
	if l.Level != "" {
		if err := level.UnmarshalText([]byte(l.Level)); err != nil {
			return nil, fmt.Errorf("log level %q: want debug, info, warn or error", l.Level)
		}
	}
	opt := &slog.HandlerOptions{Level: level, ReplaceAttr: redact}
	switch {
	case l.Format == "json", (l.Format == "auto" || l.Format == "") && !isTerminal(l.Writer):
		return slog.New(slog.NewJSONHandler(l.Writer, opt)), nil
	case l.Format != "text" && l.Format != "auto" && l.Format != "":
		return nil, fmt.Errorf("log format %q: want auto, text or json", l.Format)
	case isTerminal(l.Writer):
		return slog.New(newTextHandler(l.Writer, level)), nil
	default:
		return slog.New(slog.NewTextHandler(l.Writer, opt)), nil
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// redact replaces secrets in an attribute.
func redact(_ []string, a slog.Attr) slog.Attr {
	if namesSecret(a.Key) {
		return slog.String(a.Key, hidden)
	}
	switch a.Value.Kind() {
	case slog.KindString:
		if text := a.Value.String(); strings.Contains(text, "e2b_") {
			a.Value = slog.StringValue(apiKey.ReplaceAllString(text, hidden))
		}
	case slog.KindAny:
		if text := textOf(a.Value.Any()); strings.Contains(text, "e2b_") {
			a.Value = slog.StringValue(apiKey.ReplaceAllString(text, hidden))
		}
	case slog.KindBool, slog.KindDuration, slog.KindFloat64, slog.KindInt64, slog.KindUint64, slog.KindTime: // hold no secret
	case slog.KindGroup, slog.KindLogValuer: // slog opens them and asks for what is inside
	}
	return a
}

// textOf returns what a handler could show of v: errors and stringers as they speak, bytes as text, the rest by its fields.
func textOf(v any) string {
	if b, ok := v.([]byte); ok {
		return string(b)
	}
	return fmt.Sprintf("%+v", v)
}

// namesSecret reports whether an attribute of that key holds a secret: key_id and token_count do not.
func namesSecret(key string) bool {
	key = strings.ToLower(key)
	for _, word := range []string{"password", "secret", "authorization", "cookie"} {
		if strings.Contains(key, word) {
			return true
		}
	}
	return key == "key" || key == "token" || strings.HasSuffix(key, "_key") || strings.HasSuffix(key, "_token")
}
