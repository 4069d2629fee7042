package history

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	_ "modernc.org/sqlite" // the "sqlite" driver of database/sql

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxQueued is how many events may wait for the writer.
	maxQueued = 16 << 10
	// maxAppend is how many events one Append may carry, and about how many one transaction writes.
	maxAppend = 2048
	readers   = 2
)

// Config is what Open needs.
type Config struct {
	// Path is the database file; it is made where it is missing.
	Path   string
	Logger *slog.Logger
	// MaxAge and MaxEvents bound what is kept; 0 means 30 days and 1,000,000 events.
	MaxAge    time.Duration
	MaxEvents int64
}

const (
	defaultMaxAge    = 30 * 24 * time.Hour
	defaultMaxEvents = 1_000_000
)

// History keeps events.
type History struct {
	cfg   Config
	write *sql.DB // one connection, used by Run alone after Open
	read  *sql.DB

	room    *semaphore.Weighted
	queue   chan *batch
	stopped chan struct{} // closed when Run has ended
	dropped atomic.Int64
}

// batch is events that are stored together; result is told when they are.
type batch struct {
	events []Event
	result chan error // nil where nobody waits; else with room for one
}

// Open opens the history and brings its schema up to date. Run must be started for anything to be stored.
func Open(ctx context.Context, cfg Config) (*History, error) {
	if cfg.Path == "" || cfg.Logger == nil {
		return nil, sandbox.Invalidf("history: a path and a logger are needed")
	}
	if cfg.MaxAge == 0 {
		cfg.MaxAge = defaultMaxAge
	}
	if cfg.MaxEvents == 0 {
		cfg.MaxEvents = defaultMaxEvents
	}
	h := &History{
		cfg: cfg, room: semaphore.NewWeighted(maxQueued), queue: make(chan *batch, maxQueued), stopped: make(chan struct{}),
	}
	err := h.open(ctx)
	if damaged(err) {
		if err = h.putAside(ctx, err); err == nil {
			err = h.open(ctx)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open history %s: %w", cfg.Path, err), h.Close())
	}
	return h, nil
}

func (h *History) open(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(h.cfg.Path), 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	// The file is made here for its mode; SQLite gives the same one to what it adds.
	f, err := os.OpenFile(h.cfg.Path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if h.write, err = connect(h.cfg.Path, "synchronous(FULL)", "cache_size(-2048)"); err != nil {
		return err
	}
	h.write.SetMaxOpenConns(1)
	if err := migrate(ctx, h.write); err != nil {
		return err
	}
	if err := h.reserve(ctx); err != nil { // the disk may be full already, which is no reason not to open
		h.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "the history has no room of its own on the disk", slog.Any("err", err))
	}
	if h.read, err = connect(h.cfg.Path, "query_only(1)", "cache_size(-1024)"); err != nil {
		return err
	}
	h.read.SetMaxOpenConns(readers)
	h.read.SetMaxIdleConns(1)
	return nil
}

func connect(path string, pragmas ...string) (*sql.DB, error) {
	pragmas = append(pragmas, "busy_timeout(5000)", "journal_mode(WAL)")
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{"_pragma": pragmas}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return db, nil
}

// Close closes the database. Run must have ended.
func (h *History) Close() error {
	var errs []error
	for _, db := range []*sql.DB{h.read, h.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close history: %w", err)
	}
	return nil
}

// Append stores events and returns once they are durable. While 16,384 events wait already it waits for room until ctx
// ends. Errors: ErrInvalid, ErrExhausted when there was no room in time, ErrUnavailable once Run has ended.
func (h *History) Append(ctx context.Context, events []Event) error {
	for len(events) > 0 {
		n := min(len(events), maxAppend)
		if err := h.append(ctx, events[:n]); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

func (h *History) append(ctx context.Context, events []Event) error {
	b := &batch{events: make([]Event, len(events)), result: make(chan error, 1)}
	for i, e := range events {
		var err error
		if b.events[i], err = bounded(e); err != nil {
			return err
		}
	}
	if err := h.room.Acquire(ctx, int64(len(b.events))); err != nil {
		return fmt.Errorf("%w: %d events wait to be written: %w", sandbox.ErrExhausted, maxQueued, err)
	}
	select {
	case h.queue <- b: // has room: each batch holds at least one of the semaphore's units
	case <-h.stopped:
		return h.ended()
	}
	select {
	case err := <-b.result:
		return err
	case <-ctx.Done():
		return fmt.Errorf("append to history: %w", ctx.Err())
	case <-h.stopped:
	}
	select {
	case err := <-b.result: // written by Run's last act
		return err
	default:
		return h.ended()
	}
}

func (h *History) ended() error { return sandbox.Unavailablef("the history is closed") }

// Note stores an event some time soon and never waits. While 16,384 events wait already the event is dropped; what was
// dropped is counted, and the count is stored as an event of type "history.dropped" when there is room again.
func (h *History) Note(e Event) {
	e, err := bounded(e)
	if err != nil || !h.room.TryAcquire(1) {
		h.dropped.Add(1)
		return
	}
	select {
	case h.queue <- &batch{events: []Event{e}}:
	case <-h.stopped:
		h.dropped.Add(1)
	}
}
