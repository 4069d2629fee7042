package journal

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Admit makes room for a sandbox and writes its record, in one transaction: what is allocated plus what is asked never
// exceeds the capacity. When the record's idempotency key was seen before, the earlier record is returned instead, and
// earlier is true. Errors: ErrExhausted, whose text says what is short and by how much; ErrInvalid; ErrConflict for an
// id in use. Soft.
func (j *Journal) Admit(ctx context.Context, r Record) (admitted Record, earlier bool, err error) {
	if err := validate(&r); err != nil {
		return Record{}, false, err
	}
	admitted = r
	err = j.commit(ctx, false, func(ctx context.Context, t *tx) error {
		if r.IdempotencyKey != "" {
			seen, err := t.read(ctx, t.stmt.byKey, r.IdempotencyKey)
			if err == nil {
				admitted, earlier = seen, true
				return nil
			}
			if !errors.Is(err, sql.ErrNoRows) {
				return err
			}
		}
		if why := t.sums.short(r.Resources, t.opt.MaxSandboxes); why != "" {
			return sandbox.Exhaustedf("no room for sandbox %s: %s", r.ID, why)
		}
		return t.insert(ctx, &r)
	})
	if err != nil {
		return Record{}, false, err
	}
	return admitted, earlier, nil
}

func validate(r *Record) error {
	if _, err := sandbox.ParseID(string(r.ID)); err != nil {
		return err
	}
	if r.State != sandbox.StateCreating {
		return sandbox.Invalidf("sandbox %s: a new record is %s, not %q", r.ID, sandbox.StateCreating, r.State)
	}
	if n := r.Resources; n.MilliCPU <= 0 || n.MemoryBytes <= 0 || n.DiskBytes < 0 {
		return sandbox.Invalidf("sandbox %s: resources %+v: want millicores and memory above zero", r.ID, n)
	}
	return nil
}

func (t *tx) insert(ctx context.Context, r *Record) error {
	if _, err := t.get(ctx, r.ID); err == nil {
		return sandbox.Conflictf("sandbox %s exists", r.ID)
	} else if !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", r.ID, err)
	}
	if _, err := t.stmt.insert.ExecContext(ctx, string(r.ID), keyOf(r), raw); err != nil {
		return fmt.Errorf("insert record %s: %w", r.ID, err)
	}
	t.sums.count(r, 1)
	return nil
}

// short says what is missing for ask; empty when it fits.
func (l *Ledger) short(ask sandbox.Resources, most int) string {
	var why []string
	lack := func(what string, ask, used, capacity int64, show func(int64) string) {
		if ask > capacity-used {
			why = append(why, fmt.Sprintf("%s: %s asked, %s of %s free",
				what, show(ask), show(max(0, capacity-used)), show(capacity)))
		}
	}
	used := l.Allocated.Resources
	lack("memory", ask.MemoryBytes, used.MemoryBytes, l.Capacity.MemoryBytes, showBytes)
	lack("processor", ask.MilliCPU, used.MilliCPU, l.Capacity.MilliCPU, showCores)
	lack("disk", ask.DiskBytes, used.DiskBytes, l.Capacity.DiskBytes, showBytes)
	if most > 0 && l.Allocated.Sandboxes >= most {
		why = append(why, fmt.Sprintf("sandboxes: %d of at most %d exist", l.Allocated.Sandboxes, most))
	}
	if len(why) == 0 {
		return ""
	}
	return fmt.Sprintf("%s (%d sandboxes hold room, %d of them warm)",
		strings.Join(why, "; "), l.Allocated.Sandboxes, l.Warm.Sandboxes)
}

// Fits reports whether a sandbox of the given size would be admitted now.
func (j *Journal) Fits(ask sandbox.Resources) bool {
	l := j.Ledger()
	return l.short(ask, j.opt.MaxSandboxes) == ""
}

// FitsWithoutWarm reports whether a sandbox of the given size would be admitted if every warm one were gone.
func (j *Journal) FitsWithoutWarm(ask sandbox.Resources) bool {
	l := j.Ledger()
	l.Allocated = Amount{
		Sandboxes: l.Allocated.Sandboxes - l.Warm.Sandboxes, Resources: l.Allocated.Resources.Sub(l.Warm.Resources),
	}
	return l.short(ask, j.opt.MaxSandboxes) == ""
}

func showBytes(n int64) string {
	const mib = 1 << 20
	if n >= mib<<10 {
		return fmt.Sprintf("%.1f GiB", float64(n)/(mib<<10))
	}
	return fmt.Sprintf("%.0f MiB", float64(n)/mib)
}

func showCores(n int64) string { return fmt.Sprintf("%.2f cores", float64(n)/1000) }
