package gvisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Stop ends a guest and frees what it held. See engine.Engine.
func (e *Engine) Stop(ctx context.Context, id sandbox.ID) error {
	g, err := e.find(id)
	switch {
	case errors.Is(err, sandbox.ErrInvalid):
		return err
	case err == nil:
		if err := e.end(ctx, g); err != nil {
			return fmt.Errorf("stop %s: %w", id, err)
		}
	}
	if err := e.clear(ctx, id); err != nil {
		return fmt.Errorf("stop %s: %w", id, err)
	}
	e.mu.Lock()
	if e.guests[id] == g {
		delete(e.guests, id)
	}
	e.mu.Unlock()
	return nil
}

// end kills a guest's process, waits until all of them are gone, and records the end for those who wait.
func (e *Engine) end(ctx context.Context, g *guest) error {
	if g.running() {
		g.mu.Lock()
		g.stopped = true
		g.mu.Unlock()
		if err := g.proc.kill(); err != nil && !errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("kill process %d: %w", g.proc.pid, err)
		}
		if err := g.proc.wait(ctx); err != nil {
			return fmt.Errorf("wait for process %d: %w", g.proc.pid, err)
		}
	}
	g.finish(e.cgroups)
	return nil
}

// clear removes everything of a guest, whatever there is of it: the processes, the control group, the files, and as the
// last the directory by which it is found. Nothing to remove is no error.
func (e *Engine) clear(ctx context.Context, id sandbox.ID) error {
	bundle := e.bundle(id)
	pids := e.cgroups.pids(id)
	if _, err := os.Stat(filepath.Join(bundle, recordFile)); errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(bundle); err == nil { // it was not started completely: nobody noted its process
			pids = append(pids, findSentries(bundle)...)
			e.log.LogAttrs(ctx, slog.LevelInfo, "clearing a start that did not finish",
				slog.String("sandbox_id", string(id)), slog.Int("processes", len(pids)))
		}
	}
	slices.Sort(pids)
	if err := killAll(ctx, slices.Compact(pids)); err != nil {
		return err
	}
	if err := e.cgroups.remove(ctx, id); err != nil {
		return err
	}
	if err := os.Remove(e.socket(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove control socket: %w", err)
	}
	// The record goes first: a directory without one is a start that has to be undone, never a running guest.
	if err := os.Remove(filepath.Join(bundle, recordFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	if err := os.RemoveAll(bundle); err != nil {
		return fmt.Errorf("remove directory: %w", err)
	}
	return nil
}

// List returns the guests that exist and the remains of others. See engine.Engine.
func (e *Engine) List(ctx context.Context) ([]engine.Guest, error) {
	entries, err := os.ReadDir(e.cfg.Root)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list guests: %w", err)
	}
	var out []engine.Guest
	for _, entry := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		id, err := sandbox.ParseID(entry.Name())
		if err != nil || !entry.IsDir() || e.isStarting(id) {
			continue
		}
		item := engine.Guest{ID: id}
		if g, err := e.find(id); err == nil && g.running() {
			item.Running, item.PID = true, g.proc.pid
		}
		out = append(out, item)
	}
	return out, nil
}

// isStarting reports whether a Start of this Engine has not returned yet.
func (e *Engine) isStarting(id sandbox.ID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	g, known := e.guests[id]
	return known && g == nil
}

// Wait blocks until a guest has ended. See engine.Engine.
func (e *Engine) Wait(ctx context.Context, id sandbox.ID) (engine.Exit, error) {
	g, err := e.find(id)
	if err != nil {
		return engine.Exit{}, err
	}
	if g.proc != nil {
		if err := g.proc.wait(ctx); err != nil {
			return engine.Exit{}, fmt.Errorf("wait for %s: %w", id, err)
		}
	}
	return g.finish(e.cgroups), nil
}

// Stats returns what a guest uses now. See engine.Engine.
func (e *Engine) Stats(_ context.Context, id sandbox.ID) (engine.Stats, error) {
	g, err := e.find(id)
	if err != nil {
		return engine.Stats{}, err
	}
	u := e.cgroups.usage(id)
	return engine.Stats{
		Time: time.Now(), CPUTime: u.cpu, MemoryBytes: u.memory, CacheBytes: u.cache, DiskBytes: g.diskBytes(),
	}, nil
}

// diskBytes returns what the guest's writes occupy; 0 once it has ended, since the file ends with it.
func (g *guest) diskBytes() int64 {
	if g.proc == nil {
		return 0
	}
	dir := filepath.Join("/proc", strconv.Itoa(g.proc.pid), "fd")
	g.mu.Lock()
	fd := g.diskFD
	g.mu.Unlock()
	if fd >= 0 {
		if n, ok := g.blocks(filepath.Join(dir, strconv.Itoa(fd))); ok {
			return n
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, entry := range entries {
		n, ok := g.blocks(filepath.Join(dir, entry.Name()))
		if !ok {
			continue
		}
		if fd, err := strconv.Atoi(entry.Name()); err == nil {
			g.mu.Lock()
			g.diskFD = fd
			g.mu.Unlock()
		}
		return n
	}
	return 0
}

// blocks returns the size on disk of the file at path, if it is the one that holds what the guest wrote.
func (g *guest) blocks(path string) (int64, bool) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Dev != g.rec.Device || st.Ino != g.rec.Inode {
		return 0, false
	}
	const blockSize = 512 // of st_blocks, always
	return st.Blocks * blockSize, true
}
