package apitest

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Decided keeps what the store keeps of single sandboxes, in memory.
type Decided struct {
	mu       sync.Mutex
	placed   map[sandbox.ID]sandbox.Placement
	replicas map[sandbox.ID]sandbox.Replica
	kills    map[sandbox.ID]sandbox.KillIntent
	pins     map[string]sandbox.Pin
	stored   map[string]sandbox.Stored
	failing  error
	after    bool
}

// NewDecided returns empty records.
func NewDecided() *Decided {
	return &Decided{
		placed: make(map[sandbox.ID]sandbox.Placement), replicas: make(map[sandbox.ID]sandbox.Replica),
		kills: make(map[sandbox.ID]sandbox.KillIntent), pins: make(map[string]sandbox.Pin),
		stored: make(map[string]sandbox.Stored),
	}
}

// FailWrites makes every write fail until err is nil; with after it is carried out all the same.
func (d *Decided) FailWrites(err error, after bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failing, d.after = err, after
}

// write carries out a write as FailWrites says.
func (d *Decided) write(do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing != nil && !d.after {
		return d.failing
	}
	if err := do(); err != nil {
		return err
	}
	return d.failing
}

// Placement implements control's interface.
func (d *Decided) Placement(_ context.Context, id sandbox.ID) (sandbox.Placement, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, ok := d.placed[id]
	if !ok {
		return p, sandbox.NotFoundf("placement %q does not exist", id)
	}
	return p, nil
}

// Placements implements control's interface.
func (d *Decided) Placements(context.Context) ([]sandbox.Placement, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.placed)), nil
}

// CommitPlacement implements control's interface.
func (d *Decided) CommitPlacement(_ context.Context, p sandbox.Placement) error {
	return d.write(func() error { return d.commit(p) })
}

// commit requires mu.
func (d *Decided) commit(p sandbox.Placement) error {
	old, ok := d.placed[p.ID]
	if ok && old.Generation >= p.Generation {
		return sandbox.Conflictf("sandbox %s is placed by generation %d already", p.ID, old.Generation)
	}
	if ok {
		p.AddStale(append(old.Stale, old.Node)...)
	}
	d.placed[p.ID] = p
	return nil
}

// ChangePlacement implements control's interface.
func (d *Decided) ChangePlacement(_ context.Context, id sandbox.ID, change func(*sandbox.Placement) bool) error {
	return d.write(func() error {
		p, ok := d.placed[id]
		if !ok {
			return sandbox.NotFoundf("placement %q does not exist", id)
		}
		if !change(&p) {
			delete(d.placed, id)
			return nil
		}
		d.placed[id] = p
		return nil
	})
}

// Replicas implements control's interface.
func (d *Decided) Replicas(context.Context) ([]sandbox.Replica, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.replicas)), nil
}

// CreateReplica implements control's interface.
func (d *Decided) CreateReplica(_ context.Context, r sandbox.Replica) error {
	return d.write(func() error {
		if _, ok := d.replicas[r.ID]; ok {
			return sandbox.Conflictf("replica %q exists already", r.ID)
		}
		d.replicas[r.ID] = r
		return nil
	})
}

// same requires mu.
func (d *Decided) same(old sandbox.Replica) error {
	r, ok := d.replicas[old.ID]
	switch {
	case !ok:
		return sandbox.NotFoundf("replica %q does not exist", old.ID)
	case !r.Same(old):
		return sandbox.Conflictf("replica %q was changed", old.ID)
	}
	return nil
}

// UpdateReplica implements control's interface.
func (d *Decided) UpdateReplica(_ context.Context, old, next sandbox.Replica) error {
	return d.write(func() error {
		if err := d.same(old); err != nil {
			return err
		}
		d.replicas[old.ID] = next
		return nil
	})
}

// RemoveReplica implements control's interface.
func (d *Decided) RemoveReplica(_ context.Context, old sandbox.Replica) error {
	return d.write(func() error {
		if err := d.same(old); err != nil {
			return err
		}
		delete(d.replicas, old.ID)
		return nil
	})
}

// MoveReplica implements control's interface.
func (d *Decided) MoveReplica(_ context.Context, old, next sandbox.Replica, p sandbox.Placement) error {
	return d.write(func() error {
		if err := d.same(old); err != nil {
			return err
		}
		if err := d.commit(p); err != nil {
			return err
		}
		d.replicas[old.ID] = next
		return nil
	})
}

// KillIntents implements control's interface.
func (d *Decided) KillIntents(context.Context) ([]sandbox.KillIntent, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.kills)), nil
}

// PutKillIntent implements control's interface.
func (d *Decided) PutKillIntent(_ context.Context, k sandbox.KillIntent) error {
	return d.write(func() error { d.kills[k.ID] = k; return nil })
}

// DeleteKillIntent implements control's interface.
func (d *Decided) DeleteKillIntent(_ context.Context, id sandbox.ID) error {
	return d.write(func() error { delete(d.kills, id); return nil })
}

// Pin implements control's interface; pins do not end.
func (d *Decided) Pin(_ context.Context, p sandbox.Pin, _ time.Duration) (sandbox.Pin, bool, error) {
	old, was := p, false
	err := d.write(func() error {
		if old, was = d.pins[p.Key]; !was {
			old, d.pins[p.Key] = p, p
		}
		return nil
	})
	return old, was, err
}

// MovePin implements control's interface.
func (d *Decided) MovePin(_ context.Context, from sandbox.Pin, to sandbox.NodeID) error {
	return d.write(func() error {
		if d.pins[from.Key] != from {
			return sandbox.Conflictf("idempotency key %q was changed", from.Key)
		}
		from.Node = to
		d.pins[from.Key] = from
		return nil
	})
}

// Unpin implements control's interface.
func (d *Decided) Unpin(_ context.Context, key string) error {
	return d.write(func() error { delete(d.pins, key); return nil })
}

// Stored implements control's interface.
func (d *Decided) Stored(context.Context) ([]sandbox.Stored, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.stored)), nil
}

// PutStored implements control's interface.
func (d *Decided) PutStored(_ context.Context, one sandbox.Stored) error {
	return d.write(func() error { d.stored[one.Checkpoint] = one; return nil })
}

// DeleteStored implements control's interface.
func (d *Decided) DeleteStored(_ context.Context, checkpoint string) error {
	return d.write(func() error { delete(d.stored, checkpoint); return nil })
}
