package history

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// migrations returns the steps from an empty file to the newest schema; the file's version is how many it has taken. A
// step that was released is never edited.
func migrations() []string {
	return []string{
		`
		CREATE TABLE events (
			id         INTEGER PRIMARY KEY AUTOINCREMENT,
			time       INTEGER NOT NULL, -- nanoseconds since 1970
			type       TEXT NOT NULL,
			node_id    TEXT NOT NULL,
			sequence   INTEGER,          -- the node's number, NULL where there is none
			sandbox_id TEXT NOT NULL,
			message    TEXT NOT NULL,
			fields     TEXT              -- JSON, NULL where there are none
		);
		CREATE UNIQUE INDEX events_once ON events (node_id, sequence) WHERE sequence IS NOT NULL;
		CREATE INDEX events_by_sandbox ON events (sandbox_id, id) WHERE sandbox_id <> '';
		CREATE INDEX events_by_type ON events (type, id);
		CREATE INDEX events_by_time ON events (time);`,
	}
}

// migrate brings the file to the newest schema, each step whole or not at all.
func migrate(ctx context.Context, db *sql.DB) error {
	steps := migrations()
	var have int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&have); err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if have > len(steps) {
		return sandbox.Unsupportedf("the history has schema version %d and this build knows up to %d: run a newer cloister",
			have, len(steps))
	}
	for i := have; i < len(steps); i++ {
		if err := takeStep(ctx, db, steps[i], i+1); err != nil {
			return fmt.Errorf("migrate to schema version %d: %w", i+1, err)
		}
	}
	return nil
}

func takeStep(ctx context.Context, db *sql.DB, step string, version int) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	if _, err := tx.ExecContext(ctx, step); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", version)); err != nil { // takes no parameters
		return err
	}
	return tx.Commit()
}
