package gvisor

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/log"
)

// owner is who owns one of this process's standard streams.
type owner struct {
	fd       int
	uid, gid int
}

// stdioOwners notes who owns this process's standard streams. gVisor gives them to the sentry's user at each start.
func stdioOwners() []owner {
	var out []owner
	for fd := range 3 {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil {
			out = append(out, owner{fd: fd, uid: int(st.Uid), gid: int(st.Gid)})
		}
	}
	return out
}

// restoreOwners gives the standard streams back.
func restoreOwners(owners []owner) {
	for _, o := range owners {
		_ = unix.Fchown(o.fd, o.uid, o.gid) // where this fails, gVisor could not change it either
	}
}

// captureLog sends what gVisor says in this process to l, at debug level.
func captureLog(l *slog.Logger) { log.SetTarget(emitter{l}) }

// emitter is a gVisor log target.
type emitter struct{ log *slog.Logger }

// Emit implements the target.
func (e emitter) Emit(_ int, level log.Level, _ time.Time, format string, v ...any) {
	ctx := context.Background()
	if e.log.Enabled(ctx, slog.LevelDebug) {
		e.log.LogAttrs(ctx, slog.LevelDebug, "gvisor says",
			slog.String("level", level.String()), slog.String("text", fmt.Sprintf(format, v...)))
	}
}
