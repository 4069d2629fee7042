package journal

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// migrations returns the steps from one version of the file to the next; the file's version is how many were taken. A
// step that was released is never edited.
func migrations() []string {
	return []string{
		`CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
		CREATE TABLE sandboxes (id TEXT PRIMARY KEY, idempotency_key TEXT, record BLOB NOT NULL);
		CREATE UNIQUE INDEX sandboxes_by_key ON sandboxes (idempotency_key) WHERE idempotency_key IS NOT NULL;
		CREATE TABLE changes (sequence INTEGER PRIMARY KEY, change BLOB NOT NULL);
		CREATE TABLE images (digest TEXT PRIMARY KEY, image BLOB NOT NULL) WITHOUT ROWID;`,
	}
}

// migrate brings the file to the newest version, each step in its own transaction.
func migrate(ctx context.Context, c *sql.Conn) error {
	var have int
	if err := c.QueryRowContext(ctx, "PRAGMA user_version").Scan(&have); err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	steps := migrations()
	if have > len(steps) {
		return sandbox.Unsupportedf("the journal has schema version %d, this program knows versions up to %d: "+
			"start the newer program that wrote it", have, len(steps))
	}
	for n := have; n < len(steps); n++ {
		// PRAGMA takes no parameters; the version is part of the transaction.
		step := fmt.Sprintf("BEGIN IMMEDIATE; %s PRAGMA user_version = %d; COMMIT", steps[n], n+1)
		if _, err := c.ExecContext(ctx, step); err != nil {
			_, _ = c.ExecContext(ctx, "ROLLBACK")
			return fmt.Errorf("migrate to schema version %d: %w", n+1, err)
		}
	}
	return nil
}
