package journal

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// statements are the prepared statements of the one connection.
type statements struct {
	all                                       []*sql.Stmt
	begin, end, rollback, save, undo, release *sql.Stmt
	get, byKey, insert, update, remove        *sql.Stmt
	append, trim, setMeta                     *sql.Stmt
	getImage, putImage, removeImage           *sql.Stmt
}

func (s *statements) prepare(ctx context.Context, c *sql.Conn) error {
	for _, p := range []struct {
		into  **sql.Stmt
		query string
	}{
		{&s.begin, "BEGIN IMMEDIATE"},
		{&s.end, "COMMIT"},
		{&s.rollback, "ROLLBACK"},
		{&s.save, "SAVEPOINT one"},
		{&s.undo, "ROLLBACK TO one"},
		{&s.release, "RELEASE one"},
		{&s.get, "SELECT record FROM sandboxes WHERE id = ?"},
		{&s.byKey, "SELECT record FROM sandboxes WHERE idempotency_key = ?"},
		{&s.insert, "INSERT INTO sandboxes (id, idempotency_key, record) VALUES (?, ?, ?)"},
		{&s.update, "UPDATE sandboxes SET record = ?2, idempotency_key = ?3 WHERE id = ?1"},
		{&s.remove, "DELETE FROM sandboxes WHERE id = ?"},
		{&s.append, "INSERT INTO changes VALUES (?, ?)"},
		{&s.trim, "DELETE FROM changes WHERE sequence <= ?"},
		{&s.setMeta, "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"},
		{&s.getImage, "SELECT image FROM images WHERE digest = ?"},
		{&s.putImage, "INSERT INTO images VALUES (?, ?) ON CONFLICT (digest) DO UPDATE SET image = excluded.image"},
		{&s.removeImage, "DELETE FROM images WHERE digest = ?"},
	} {
		st, err := c.PrepareContext(ctx, p.query)
		if err != nil {
			return fmt.Errorf("prepare %q: %w", p.query, err)
		}
		*p.into = st
		s.all = append(s.all, st)
	}
	return nil
}

func (s *statements) close() {
	for _, st := range s.all {
		_ = st.Close() // the connection closes next
	}
}

// get reads one record.
func (t *tx) get(ctx context.Context, id sandbox.ID) (Record, error) {
	r, err := t.read(ctx, t.stmt.get, string(id))
	if errors.Is(err, sql.ErrNoRows) {
		return r, sandbox.NotFoundf("the journal has no sandbox %s", id)
	}
	return r, err
}

func (t *tx) read(ctx context.Context, st *sql.Stmt, key string) (Record, error) {
	var raw []byte
	var r Record
	if err := st.QueryRowContext(ctx, key).Scan(&raw); err != nil {
		return r, fmt.Errorf("read record %s: %w", key, err)
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("read record %s: %w", key, err)
	}
	return r, nil
}

// put replaces a record that is there.
func (t *tx) put(ctx context.Context, r *Record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", r.ID, err)
	}
	if _, err := t.stmt.update.ExecContext(ctx, string(r.ID), raw, keyOf(r)); err != nil {
		return fmt.Errorf("write record %s: %w", r.ID, err)
	}
	return nil
}

// image reads what is known of an image; of an unknown one that is its digest. Of images that an earlier version noted, the one
// template that it knew needs them.
func (t *tx) image(ctx context.Context, digest string) (Image, error) {
	im := Image{Digest: digest}
	var raw []byte
	err := t.stmt.getImage.QueryRowContext(ctx, digest).Scan(&raw)
	if errors.Is(err, sql.ErrNoRows) {
		return im, nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &im)
	}
	if err != nil {
		return im, fmt.Errorf("read image %s: %w", digest, err)
	}
	if len(im.Templates) == 0 && !im.Removed && im.TemplateID != "" {
		im.Templates = []sandbox.TemplateID{im.TemplateID}
	}
	return im, nil
}

func (t *tx) replaceImage(ctx context.Context, im *Image) error {
	raw, err := json.Marshal(im)
	if err != nil {
		return fmt.Errorf("encode image %s: %w", im.Digest, err)
	}
	if _, err := t.stmt.putImage.ExecContext(ctx, im.Digest, raw); err != nil {
		return fmt.Errorf("put image %s: %w", im.Digest, err)
	}
	return nil
}

// keyOf returns the record's idempotency key for its column.
func keyOf(r *Record) sql.NullString {
	return sql.NullString{String: r.IdempotencyKey, Valid: r.IdempotencyKey != ""}
}

// append numbers a change and keeps it; when too many are kept, the oldest goes.
func (t *tx) append(ctx context.Context, c Change) (Mark, error) {
	raw, err := json.Marshal(c)
	if err != nil {
		return Mark{}, fmt.Errorf("encode change of %s: %w", c.Sandbox.ID, err)
	}
	n := t.sums.Sequence + 1
	if _, err := t.stmt.append.ExecContext(ctx, n, raw); err != nil {
		return Mark{}, fmt.Errorf("append change %d: %w", n, err)
	}
	t.sums.Sequence = n
	if last := n - int64(t.opt.MaxChanges); last >= t.sums.Oldest {
		if _, err := t.stmt.trim.ExecContext(ctx, last); err != nil {
			return Mark{}, fmt.Errorf("drop changes up to %d: %w", last, err)
		}
		t.sums.Oldest = last + 1
	}
	return Mark{Sequence: n, Type: c.Type, Time: c.Time}, nil
}
