package store

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"strings"

	"go.uber.org/zap"         //nolint:depguard // etcd logs through zap alone; this file turns that into slog
	"go.uber.org/zap/zapcore" //nolint:depguard // as above
)

// quiet reports whether a line of etcd's says only that the member is young or has no listeners, both on purpose:
// until the first snapshot it cannot tell the schema version of its files, and asks again every few seconds.
func quiet(message string, fields []zapcore.Field) bool {
	if strings.HasPrefix(message, "Running http and grpc server on single port") {
		return true
	}
	if !strings.EqualFold(message, "failed to detect schema version") && message != "failed to update storage version" {
		return false
	}
	return slices.ContainsFunc(fields, func(f zapcore.Field) bool {
		err, ok := f.Interface.(error)
		return ok && strings.HasSuffix(err.Error(), "missing term information")
	})
}

// zapLogger returns a zap logger whose warnings and errors appear in log as "etcd" lines.
func zapLogger(log *slog.Logger) *zap.Logger {
	return zap.New(&slogCore{log: log}, zap.WithFatalHook(fatal{log}))
}

// fatal ends the process, as etcd asks for when it cannot be sure of its files any more. The next start reads them again.
type fatal struct{ log *slog.Logger }

// OnWrite implements zapcore.CheckWriteHook.
func (f fatal) OnWrite(*zapcore.CheckedEntry, []zapcore.Field) {
	f.log.LogAttrs(context.Background(), slog.LevelError, "the cluster store cannot go on, and this process ends: see the line before; "+
		"where the disk is full, free space and start it again, nothing acknowledged is lost and sandboxes go on running")
	os.Exit(1) //nolint:forbidigo // etcd goes no further than here, and panicking would say less
}

// slogCore is a zapcore.Core that writes to slog.
type slogCore struct {
	log *slog.Logger
}

// Enabled implements zapcore.LevelEnabler.
func (*slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

// With implements zapcore.Core.
func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	out := c.log
	for _, a := range attrs(fields) {
		out = out.With(a)
	}
	return &slogCore{log: out}
}

// Check implements zapcore.Core.
func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements zapcore.Core.
func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if quiet(e.Message, fields) {
		return nil
	}
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	all := append([]slog.Attr{slog.String("detail", e.Message)}, attrs(fields)...)
	c.log.LogAttrs(context.Background(), level, "etcd", all...)
	return nil
}

// Sync implements zapcore.Core.
func (*slogCore) Sync() error { return nil }

// attrs turns zap fields into slog attributes with snake_case keys, in order of key.
func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	out := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		if k == "error" {
			k = "err"
		}
		out = append(out, slog.Any(strings.ReplaceAll(k, "-", "_"), v))
	}
	slices.SortFunc(out, func(a, b slog.Attr) int { return strings.Compare(a.Key, b.Key) })
	return out
}
