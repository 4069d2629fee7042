package journal

import (
	"context"
	"errors"
	"fmt"
	"os"

	"modernc.org/sqlite"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// reserveBytes is the room that the journal takes on the disk ahead of need: with it, sandboxes of a full disk can still be
// ended, which is what frees it. It is about what the log grows to before SQLite starts it over.
const reserveBytes = 4 << 20

// reserve sees to it that the log and the database own that much room. It costs some milliseconds the first time, and
// nothing from then on, for the log outlives the connection.
func (j *Journal) reserve(ctx context.Context) error {
	err := j.conn.Raw(func(c any) error {
		fc, ok := c.(sqlite.FileControl)
		if !ok {
			return sandbox.Unsupportedf("keep the log of %s: the driver cannot", j.path)
		}
		_, err := fc.FileControlPersistWAL("main", 1)
		return err
	})
	if err != nil {
		return fmt.Errorf("keep log: %w", err)
	}
	var free, page int64
	if err := j.conn.QueryRowContext(ctx, "SELECT freelist_count, page_size FROM pragma_freelist_count, pragma_page_size").Scan(&free, &page); err != nil {
		return fmt.Errorf("read free pages: %w", err)
	}
	log, err := os.Stat(j.path + "-wal")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("find log: %w", err)
	}
	if err == nil && log.Size() >= reserveBytes && free*page >= reserveBytes/2 {
		return nil
	}
	// Two transactions: pages that are freed in the one that took them are never written.
	for _, step := range []string{
		fmt.Sprintf("BEGIN IMMEDIATE; DROP TABLE IF EXISTS reserve; CREATE TABLE reserve AS SELECT zeroblob(%d); COMMIT", reserveBytes),
		"DROP TABLE reserve",
	} {
		if _, err := j.conn.ExecContext(ctx, step); err != nil {
			_, _ = j.conn.ExecContext(ctx, "ROLLBACK")
			return fmt.Errorf("take room: %w", err)
		}
	}
	return nil
}
