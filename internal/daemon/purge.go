package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// owned are the entries of a data directory that are Cloister's; whatever else somebody put there stays.
func owned() []string {
	return []string{"node", "server", identityDir, "cache", "tls", "admin.key", "admin.key.new", "cloister.sock", "cloister.log", "cloister.log.1"}
}

// Purge ends every sandbox of the data directory and removes everything that Cloister owns there and on the machine.
// Errors: ErrConflict while a daemon runs on it.
func Purge(ctx context.Context, cfg *config.Config, opt Options) error {
	if _, err := os.Stat(cfg.DataDir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	held, err := acquire(ctx, cfg.DataDir, opt.Version)
	if err != nil {
		return err
	}
	defer held.release()
	d, err := newDaemon(cfg, opt)
	if err != nil {
		return err
	}
	disk, err := storageOf(cfg, d.log)
	if err != nil {
		return err
	}
	disk.openForPurge(ctx)
	id, err := nodeToPurge(ctx, cfg.DataDir, held.holder.Node)
	if err != nil {
		return err
	}
	if id != "" {
		if err := d.purgeNode(ctx, id); err != nil {
			return err
		}
	}
	if err := disk.purge(ctx); err != nil {
		return err
	}
	for _, name := range owned() {
		if err := os.RemoveAll(d.path(name)); err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
	}
	if err := os.Remove(lockPath(cfg.DataDir)); err != nil {
		return fmt.Errorf("remove lock: %w", err)
	}
	_ = os.Remove(cfg.DataDir) // stays when somebody keeps other things there, or when it is a mount
	return nil
}

// nodeToPurge returns the id of the data directory's node, "" where it never had one. What the lock says counts where the
// journal is missing or damaged.
func nodeToPurge(ctx context.Context, dir string, known sandbox.NodeID) (sandbox.NodeID, error) {
	if _, err := os.Stat(journalPath(dir)); errors.Is(err, os.ErrNotExist) {
		return known, nil
	}
	jr, err := journal.Open(ctx, journalPath(dir), journal.Options{NodeID: known})
	if err != nil {
		if known != "" && !errors.Is(err, sandbox.ErrConflict) {
			return known, nil
		}
		return "", fmt.Errorf("open journal: %w", err)
	}
	id := jr.NodeID()
	if err := jr.Close(); err != nil {
		return "", fmt.Errorf("close journal: %w", err)
	}
	return id, nil
}

// purgeNode removes what the node has on the machine: guests, their networks, their control groups, half-made images.
func (d *daemon) purgeNode(ctx context.Context, id sandbox.NodeID) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	parts, err := d.nodeParts(id, 0)
	if err != nil {
		return err
	}
	defer parts.network.Close()
	if err := parts.engine.Purge(ctx); err != nil {
		return fmt.Errorf("end sandboxes: %w", err)
	}
	if err := parts.network.Purge(ctx); err != nil {
		return fmt.Errorf("remove networks: %w", err)
	}
	images, err := d.imageStore()
	if err != nil {
		return err
	}
	if err := images.Recover(ctx); err != nil { // unmounts what a killed build left mounted
		return fmt.Errorf("clear images: %w", err)
	}
	return nil
}
