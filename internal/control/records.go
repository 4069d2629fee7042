package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// placements keeps where sandboxes are that were moved. CommitPlacement is the point at which a move counts: it is
// ErrConflict unless the generation is higher than the stored one, and ErrUnavailable where nobody knows what is stored.
// ChangePlacement changes what is noted beside node and generation, and deletes the record where change returns false.
type placements interface {
	Placements(ctx context.Context) ([]sandbox.Placement, error)
	Placement(ctx context.Context, id sandbox.ID) (sandbox.Placement, error)
	CommitPlacement(ctx context.Context, p sandbox.Placement) error
	ChangePlacement(ctx context.Context, id sandbox.ID, change func(*sandbox.Placement) (keep bool)) error
}

// replicas keeps the paused sandboxes that can be brought back without their nodes. All but Replicas are ErrConflict where
// the record is not as the caller knows it; MoveReplica also commits the placement, both or nothing.
type replicas interface {
	Replicas(ctx context.Context) ([]sandbox.Replica, error)
	CreateReplica(ctx context.Context, r sandbox.Replica) error
	UpdateReplica(ctx context.Context, old, next sandbox.Replica) error
	RemoveReplica(ctx context.Context, old sandbox.Replica) error
	MoveReplica(ctx context.Context, old, next sandbox.Replica, p sandbox.Placement) error
}

// intents keeps the sandboxes that are to be killed when their nodes answer again.
type intents interface {
	KillIntents(ctx context.Context) ([]sandbox.KillIntent, error)
	PutKillIntent(ctx context.Context, k sandbox.KillIntent) error
	DeleteKillIntent(ctx context.Context, id sandbox.ID) error
}

// pins keeps which node was asked for what by a request that may be repeated. Pin returns what is stored, and whether that
// was there before.
type pins interface {
	Pin(ctx context.Context, p sandbox.Pin, ttl time.Duration) (kept sandbox.Pin, was bool, err error)
	MovePin(ctx context.Context, from sandbox.Pin, to sandbox.NodeID) error
	Unpin(ctx context.Context, key string) error
}

// stored keeps which checkpoints may be in the bucket: from before they are written until they are removed.
type stored interface {
	Stored(ctx context.Context) ([]sandbox.Stored, error)
	PutStored(ctx context.Context, s sandbox.Stored) error
	DeleteStored(ctx context.Context, checkpoint string) error
}

// noted is this server's copy of the records about single sandboxes, which are few: those that were moved, those that
// have replicas, and those that are to be killed. The store has the last word.
type noted struct {
	mu       sync.RWMutex
	placed   map[sandbox.ID]sandbox.Placement
	replicas map[sandbox.ID]sandbox.Replica
	kills    map[sandbox.ID]sandbox.KillIntent
	// bereft are sandboxes whose replica record names a node that says it has them no more.
	bereft map[sandbox.ID]struct{}
	// stored are the checkpoints that may be in the bucket, with since when.
	stored map[string]time.Time
}

func newNoted() *noted {
	return &noted{
		placed: make(map[sandbox.ID]sandbox.Placement), replicas: make(map[sandbox.ID]sandbox.Replica),
		kills: make(map[sandbox.ID]sandbox.KillIntent), bereft: make(map[sandbox.ID]struct{}),
		stored: make(map[string]time.Time),
	}
}

// loadNoted reads the records.
func (c *Control) loadNoted(ctx context.Context) error {
	placed, err := c.placements.Placements(ctx)
	if err != nil {
		return fmt.Errorf("read where sandboxes were moved: %w", err)
	}
	copies, err := c.replicas.Replicas(ctx)
	if err != nil {
		return fmt.Errorf("read the replicas: %w", err)
	}
	kills, err := c.intents.KillIntents(ctx)
	if err != nil {
		return fmt.Errorf("read what is to be killed: %w", err)
	}
	for _, p := range placed {
		c.noted.placed[p.ID] = p
	}
	for _, r := range copies {
		c.noted.replicas[r.ID] = r
	}
	for _, k := range kills {
		c.noted.kills[k.ID] = k
	}
	if c.limits.Bucket {
		return c.loadStored(ctx)
	}
	return nil
}

// loadStored reads what may be in the bucket. What a record names that was written before this was noted is added.
func (c *Control) loadStored(ctx context.Context) error {
	all, err := c.stored.Stored(ctx)
	if err != nil {
		return fmt.Errorf("read what may be in the bucket: %w", err)
	}
	for _, s := range all {
		c.noted.stored[s.Checkpoint] = s.At
	}
	for _, r := range c.noted.replicas {
		if r.Bucket {
			err = errors.Join(err, c.putStored(ctx, r.Checkpoint))
		}
	}
	return err
}

// putStored notes, before a checkpoint is written to the bucket, that it may be there from then on.
func (c *Control) putStored(ctx context.Context, checkpoint string) error {
	n := c.noted
	n.mu.RLock()
	_, known := n.stored[checkpoint]
	n.mu.RUnlock()
	if known {
		return nil
	}
	s := sandbox.Stored{Checkpoint: checkpoint, At: time.Now().UTC()}
	if err := c.stored.PutStored(ctx, s); err != nil {
		return fmt.Errorf("note that %s may be in the bucket: %w", checkpoint, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stored[checkpoint] = s.At
	return nil
}

// deleteStored notes that a checkpoint is in the bucket no more.
func (c *Control) deleteStored(ctx context.Context, checkpoint string) error {
	if err := c.stored.DeleteStored(ctx, checkpoint); err != nil {
		return fmt.Errorf("note that %s is in the bucket no more: %w", checkpoint, err)
	}
	c.noted.mu.Lock()
	defer c.noted.mu.Unlock()
	delete(c.noted.stored, checkpoint)
	return nil
}

// storedFor returns the checkpoints that may be in the bucket, in order, but for those that a node may still be writing for an
// earlier server.
func (n *noted) storedFor(started, now time.Time) []string {
	n.mu.RLock()
	defer n.mu.RUnlock()
	var out []string
	for id, at := range n.stored {
		if !at.Before(started) || now.Sub(at) >= copyDeadline {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

func (n *noted) placement(id sandbox.ID) (sandbox.Placement, bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	p, ok := n.placed[id]
	return p, ok
}

func (n *noted) replica(id sandbox.ID) (sandbox.Replica, bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	r, ok := n.replicas[id]
	return r, ok
}

// doomed reports whether a sandbox is to be killed.
func (n *noted) doomed(id sandbox.ID) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	_, ok := n.kills[id]
	return ok
}

func (n *noted) allPlacements() []sandbox.Placement {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return slices.Collect(maps.Values(n.placed))
}

func (n *noted) allReplicas() map[sandbox.ID]sandbox.Replica {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return maps.Clone(n.replicas)
}

func (n *noted) allKills() []sandbox.KillIntent {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return slices.Collect(maps.Values(n.kills))
}

// setPlacement notes what was stored; nil notes that nothing is.
func (n *noted) setPlacement(id sandbox.ID, p *sandbox.Placement) {
	n.mu.Lock()
	defer n.mu.Unlock()
	set(n.placed, id, p)
}

func (n *noted) setReplica(id sandbox.ID, r *sandbox.Replica) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if r == nil || r.Returning || r.Home != n.replicas[id].Home {
		delete(n.bereft, id)
	}
	set(n.replicas, id, r)
}

// deprive notes which of the sandboxes that a node is the home of it does not have, by what it has.
func (n *noted) deprive(node sandbox.NodeID, has func(sandbox.ID) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for id, r := range n.replicas {
		switch {
		case r.Home != node || r.Returning:
		case has(id):
			delete(n.bereft, id)
		default:
			n.bereft[id] = struct{}{}
		}
	}
}

// isBereft reports whether a sandbox has to be brought back because its node lost it.
func (n *noted) isBereft(id sandbox.ID) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	_, ok := n.bereft[id]
	return ok
}

func (n *noted) setKill(id sandbox.ID, k *sandbox.KillIntent) {
	n.mu.Lock()
	defer n.mu.Unlock()
	set(n.kills, id, k)
}

func set[T any](in map[sandbox.ID]T, id sandbox.ID, value *T) {
	if value == nil {
		delete(in, id)
		return
	}
	in[id] = *value
}

// outdated reports whether a copy of a sandbox is not the one that counts, as far as this server knows.
func (n *noted) outdated(box *sandbox.Sandbox) bool {
	p, ok := n.placement(box.ID)
	return ok && p.Outdates(box.NodeID, box.Generation)
}

// any reports whether anything is noted of a sandbox that is to go when it ends.
func (n *noted) any(id sandbox.ID) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	_, placed := n.placed[id]
	_, copied := n.replicas[id]
	return placed || copied
}

// elsewhere reports whether a sandbox goes on at another node than the given one.
func (n *noted) elsewhere(id sandbox.ID, node sandbox.NodeID) bool {
	p, ok := n.placement(id)
	return ok && !p.Ended && p.Node != node
}

// commitPlacement decides where a sandbox is. An error other than ErrConflict means that nobody knows whether it did.
func (c *Control) commitPlacement(ctx context.Context, p sandbox.Placement) error {
	p.At = time.Now().UTC()
	err := c.placements.CommitPlacement(ctx, p)
	if err == nil {
		return c.reloadPlacement(ctx, p.ID)
	}
	// Without a clear answer the record itself says what happened.
	if readErr := c.reloadPlacement(ctx, p.ID); readErr != nil {
		return errors.Join(err, readErr)
	}
	if kept, ok := c.noted.placement(p.ID); ok && kept.Node == p.Node && kept.Generation == p.Generation {
		return nil
	}
	return err
}

// reloadPlacement takes a sandbox's placement from the store.
func (c *Control) reloadPlacement(ctx context.Context, id sandbox.ID) error {
	kept, err := c.placements.Placement(ctx, id)
	switch {
	case err == nil:
		c.noted.setPlacement(id, &kept)
	case errors.Is(err, sandbox.ErrNotFound):
		c.noted.setPlacement(id, nil)
		err = nil
	}
	return err
}

// changePlacement changes what is noted beside a placement. No placement is no error.
func (c *Control) changePlacement(ctx context.Context, id sandbox.ID, change func(*sandbox.Placement) (keep bool)) error {
	err := c.placements.ChangePlacement(ctx, id, change)
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return fmt.Errorf("change the placement of sandbox %s: %w", id, err)
	}
	return c.reloadPlacement(ctx, id)
}
