package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
)

// A first start that is cut off leaves a log in which etcd waits for itself for ever: the records that make it a member
// are not in it yet. Nobody has been told of anything then, so the next start begins anew. bootedName is the file that
// says that the first start came to its end; it is on the disk before anything can be written to the store.
const (
	bootedName     = "booted"
	unfinishedName = "member.unfinished"
)

// beginAnew puts away what a first start left that did not come to its end.
func beginAnew(dir string, log *slog.Logger) error {
	if isNew(dir) {
		return nil
	}
	_, err := os.Stat(filepath.Join(dir, bootedName))
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	away := filepath.Join(dir, unfinishedName)
	if err := os.RemoveAll(away); err != nil {
		return fmt.Errorf("put an unfinished first start away: %w", err)
	}
	if err := os.Rename(filepath.Join(dir, "member"), away); err != nil {
		return fmt.Errorf("put an unfinished first start away: %w", err)
	}
	log.Warn("the first start of the cluster store did not come to its end; it begins anew", slog.String("put_away", away))
	return nil
}

// noteBooted says, durably, that the first start came to its end.
func noteBooted(dir string) error {
	path := filepath.Join(dir, bootedName)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600) //nolint:gosec // in the store's own directory
	if err != nil {
		return fmt.Errorf("note the first start: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("note the first start: %w", err)
	}
	d, err := os.Open(dir) //nolint:gosec // the operator's data directory
	if err != nil {
		return fmt.Errorf("note the first start: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("note the first start: %w", err)
	}
	return nil
}
