package journal

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Options are what the journal enforces.
type Options struct {
	// Capacity is what all sandboxes together may hold.
	Capacity sandbox.Resources
	// MaxSandboxes is how many may exist at once; 0 means no limit.
	MaxSandboxes int
	// NodeID is the id of a node whose journal is lost; empty makes a new one. A journal that is there keeps its own.
	NodeID sandbox.NodeID
	// MaxChanges is how many unacknowledged changes are kept; 0 means 100,000. The oldest go first, and the server then
	// needs a full report.
	MaxChanges int
}

// ErrDamaged means that a journal's file is not what SQLite wrote.
var ErrDamaged = errors.New("damaged")

// Journal is an open journal.
type Journal struct {
	opt  Options
	path string
	db   *sql.DB
	node sandbox.NodeID

	// lead is held by whoever uses the connection.
	lead chan struct{}
	conn *sql.Conn
	stmt statements
	soft bool // the connection's present mode
	sums atomic.Pointer[Ledger]

	mu     sync.Mutex
	queue  []*request
	closed bool
}

// Open opens the journal at path and makes it where it is missing. ErrConflict means that another process has it,
// ErrDamaged that its file cannot be read any more.
func Open(ctx context.Context, path string, opt Options) (*Journal, error) {
	if opt.MaxChanges == 0 {
		opt.MaxChanges = 100_000
	}
	j := &Journal{opt: opt, path: path, lead: make(chan struct{}, 1)}
	if err := j.open(ctx); err != nil {
		_ = j.Close()
		var se *sqlite.Error
		if errors.As(err, &se) && se.Code()&0xff == sqlite3.SQLITE_BUSY {
			return nil, sandbox.Conflictf("the journal %s is in use by another process: stop that one first", path)
		}
		if errors.As(err, &se) && (se.Code()&0xff == sqlite3.SQLITE_NOTADB || se.Code()&0xff == sqlite3.SQLITE_CORRUPT) {
			return nil, fmt.Errorf("%w: journal %s is damaged (%w): put a copy back; or move it away, and the next start ends every sandbox "+
				"of this machine and keeps templates, keys and history; or begin anew with `cloister down --purge`", ErrDamaged, path, err)
		}
		return nil, fmt.Errorf("open journal %s: %w", path, err)
	}
	return j, nil
}

func (j *Journal) open(ctx context.Context) error {
	// unix-excl keeps the log's index in memory from the first moment on; a file for it could not be made on a full disk.
	dsn := url.URL{Scheme: "file", Path: j.path, RawQuery: url.Values{"vfs": {"unix-excl"}, "_pragma": {
		"busy_timeout(200)", "locking_mode(EXCLUSIVE)", "journal_mode(WAL)", "synchronous(FULL)", "cache_size(-4096)",
	}}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	j.db = db
	db.SetMaxOpenConns(1)
	if j.conn, err = db.Conn(ctx); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if err := migrate(ctx, j.conn); err != nil {
		return err
	}
	_ = j.reserve(ctx) // a disk that is full already is no reason not to open
	if err := j.stmt.prepare(ctx, j.conn); err != nil {
		return err
	}
	if err := j.identify(ctx); err != nil {
		return err
	}
	return j.sum(ctx)
}

// identify reads the node's id, and makes it once.
func (j *Journal) identify(ctx context.Context) error {
	fresh := j.opt.NodeID
	if fresh == "" {
		fresh = sandbox.NewNodeID()
	}
	_, err := j.conn.ExecContext(ctx, "INSERT INTO meta VALUES ('node_id', ?) ON CONFLICT DO NOTHING", string(fresh))
	if err != nil {
		return fmt.Errorf("write node id: %w", err)
	}
	var id string
	if err := j.conn.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = 'node_id'").Scan(&id); err != nil {
		return fmt.Errorf("read node id: %w", err)
	}
	j.node = sandbox.NodeID(id)
	return nil
}

// sum computes the ledger from the records: it is never stored, so it cannot differ from them.
func (j *Journal) sum(ctx context.Context) error {
	l := &Ledger{Capacity: j.opt.Capacity}
	var ack string
	err := j.conn.QueryRowContext(ctx, "SELECT value FROM meta WHERE key = 'acknowledged'").Scan(&ack)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("read acknowledged: %w", err)
	}
	if ack != "" {
		if l.Acknowledged, err = strconv.ParseInt(ack, 10, 64); err != nil {
			return fmt.Errorf("read acknowledged: %w", err)
		}
	}
	var oldest, newest sql.NullInt64
	err = j.conn.QueryRowContext(ctx, "SELECT min(sequence), max(sequence) FROM changes").Scan(&oldest, &newest)
	if err != nil {
		return fmt.Errorf("read sequence: %w", err)
	}
	l.Sequence = max(l.Acknowledged, newest.Int64)
	l.Oldest = l.Sequence + 1
	if oldest.Valid {
		l.Oldest = oldest.Int64
	}
	recs, err := j.records(ctx)
	if err != nil {
		return err
	}
	for i := range recs {
		l.count(&recs[i], 1)
	}
	j.sums.Store(l)
	return nil
}

// count adds a record to the sums (sign 1), or takes it out (-1).
func (l *Ledger) count(r *Record, sign int) {
	if r.State.Ended() {
		return
	}
	change := Amount.add
	if sign < 0 {
		change = Amount.sub
	}
	held := r.Held()
	l.Allocated = change(l.Allocated, held)
	switch {
	case r.Still():
		l.Allocated.Sandboxes -= sign
		l.Paused += sign
	case r.Warm:
		l.Warm = change(l.Warm, held)
	case r.State == sandbox.StateCreating:
		l.Creating += sign
	}
}

// Close waits for the transaction under way and closes the file.
func (j *Journal) Close() error {
	j.lead <- struct{}{}
	defer func() { <-j.lead }()
	j.mu.Lock()
	done := j.closed
	j.closed = true
	j.mu.Unlock()
	if done || j.db == nil {
		return nil
	}
	j.stmt.close()
	var first error
	if j.conn != nil {
		first = j.conn.Close()
	}
	return errors.Join(first, j.db.Close())
}

// NodeID returns the node's id: made when the journal was, and the same ever since.
func (j *Journal) NodeID() sandbox.NodeID { return j.node }

// Ledger returns the sums as of the last transaction.
func (j *Journal) Ledger() Ledger { return *j.sums.Load() }

// RaiseCapacity raises what sandboxes may hold, where room has become free on the machine. It lowers nothing.
func (j *Journal) RaiseCapacity(ctx context.Context, to sandbox.Resources) error {
	return j.commit(ctx, false, func(_ context.Context, t *tx) error {
		have := &t.sums.Capacity
		have.MilliCPU = max(have.MilliCPU, to.MilliCPU)
		have.MemoryBytes = max(have.MemoryBytes, to.MemoryBytes)
		have.DiskBytes = max(have.DiskBytes, to.DiskBytes)
		return nil
	})
}

// Records returns all records, in no order.
func (j *Journal) Records(ctx context.Context) ([]Record, error) {
	release, err := j.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return j.records(ctx)
}

func (j *Journal) records(ctx context.Context) ([]Record, error) {
	return readAll[Record](ctx, j.conn, "SELECT id, record FROM sandboxes")
}

// Images returns the images that the node has, in no order.
func (j *Journal) Images(ctx context.Context) ([]Image, error) {
	release, err := j.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return readAll[Image](ctx, j.conn, "SELECT digest, image FROM images")
}

// Changes returns up to limit changes after the given number, oldest first. Complete is false when some of them are no
// longer kept, or when after is a number that was never given out: the server then needs a full report.
func (j *Journal) Changes(ctx context.Context, after int64, limit int) (changes []Change, complete bool, err error) {
	release, err := j.take(ctx)
	if err != nil {
		return nil, false, err
	}
	defer release()
	l := j.Ledger()
	if after > l.Sequence || after+1 < l.Oldest {
		return nil, false, nil
	}
	changes, err = readAll[Change](ctx, j.conn,
		"SELECT sequence, change FROM changes WHERE sequence > ? ORDER BY sequence LIMIT ?", after, limit)
	if err != nil {
		return nil, false, err
	}
	for i := range changes { // there are no gaps
		changes[i].Sequence = after + 1 + int64(i)
	}
	return changes, true, nil
}

// take waits for the connection.
func (j *Journal) take(ctx context.Context) (release func(), err error) {
	select {
	case j.lead <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("read journal: %w", ctx.Err())
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		<-j.lead
		return nil, errClosed()
	}
	return func() { <-j.lead }, nil
}

func errClosed() error {
	return sandbox.Unavailablef("the journal is closed: the node is shutting down")
}

// readAll reads rows of a key and a JSON value.
func readAll[T any](ctx context.Context, c *sql.Conn, query string, args ...any) ([]T, error) {
	rows, err := c.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("query %q: %w", query, err)
	}
	defer func() { _ = rows.Close() }()
	var out []T
	for rows.Next() {
		var key string
		var raw sql.RawBytes
		if err := rows.Scan(&key, &raw); err != nil {
			return nil, fmt.Errorf("query %q: %w", query, err)
		}
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return nil, fmt.Errorf("journal entry %s: %w", key, err)
		}
		out = append(out, v)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("query %q: %w", query, err)
	}
	return out, nil
}
