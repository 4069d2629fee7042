package history

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// damaged reports whether an error says that the file is not, or not any more, what SQLite wrote.
func damaged(err error) bool {
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return false
	}
	code := se.Code() & 0xff
	return code == sqlite3.SQLITE_NOTADB || code == sqlite3.SQLITE_CORRUPT
}

// putAside renames a damaged database, so that a new one can take its place: the past is no reason not to run.
func (h *History) putAside(ctx context.Context, why error) error {
	if err := h.Close(); err != nil {
		return err
	}
	h.read, h.write = nil, nil
	name := h.cfg.Path + ".damaged-" + time.Now().UTC().Format("20060102T150405Z")
	if err := os.Rename(h.cfg.Path, name); err != nil {
		return fmt.Errorf("put aside: %w", err)
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.Rename(h.cfg.Path+suffix, name+suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("put aside: %w", err)
		}
	}
	h.cfg.Logger.LogAttrs(ctx, slog.LevelError, "the history was damaged and begins anew; the old one was put aside", slog.String("path", name), slog.Any("err", why))
	return nil
}

// reserveBytes is the room that the history takes on the disk ahead of need, about what its log grows to before SQLite
// starts it over: what happens on a full disk is what one wants to read of later.
const reserveBytes = 4 << 20

// reserve takes that room where the log does not have it yet; the log then outlives its connections.
func (h *History) reserve(ctx context.Context) error {
	conn, err := h.write.Conn(ctx)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer func() { _ = conn.Close() }() // goes back to the pool
	if err := keepLog(conn); err != nil {
		return err
	}
	if info, err := os.Stat(h.cfg.Path + "-wal"); err == nil && info.Size() >= reserveBytes {
		return nil
	}
	// Two transactions: pages that are freed in the one that took them are never written.
	for _, step := range []string{
		fmt.Sprintf("BEGIN IMMEDIATE; DROP TABLE IF EXISTS reserve; CREATE TABLE reserve AS SELECT zeroblob(%d); COMMIT", reserveBytes),
		"DROP TABLE reserve",
	} {
		if _, err := conn.ExecContext(ctx, step); err != nil {
			_, _ = conn.ExecContext(ctx, "ROLLBACK")
			return fmt.Errorf("take room: %w", err)
		}
	}
	return nil
}

func keepLog(conn *sql.Conn) error {
	err := conn.Raw(func(c any) error {
		fc, ok := c.(sqlite.FileControl)
		if !ok {
			return errors.ErrUnsupported
		}
		_, err := fc.FileControlPersistWAL("main", 1)
		return err
	})
	if err != nil {
		return fmt.Errorf("keep log: %w", err)
	}
	return nil
}
