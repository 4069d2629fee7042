package control

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

const (
	// silenceEvery is how often it is looked who has fallen silent.
	silenceEvery = time.Second
	// maxArrivals bounds the signs of life that wait to be looked at.
	maxArrivals = 256
)

// presences keeps which nodes and proxies there are. Attend keeps a record until ctx ends, and for at most ttl longer.
type presences interface {
	Attend(ctx context.Context, p store.Presence, ttl time.Duration) error
	RemovePresence(ctx context.Context, m sandbox.Member) error
	WatchPresences(ctx context.Context, w store.Watcher[store.Presence]) error
}

// attendance is who is there by the store's records, each of which is under a lease that its owner's signs of life renew.
type attendance struct {
	mu sync.Mutex
	// there is the proxies, by id.
	there map[string]store.Presence
	// arrivals hands reports to Run, which keeps the records of those who report here.
	arrivals chan arrival
}

// arrival is one sign of life of a node or a proxy.
type arrival struct {
	presence store.Presence
	// within is how soon the next one comes; ttl is how long the record stays where it does not.
	within, ttl time.Duration
	leaving     bool
	// taken is closed when the record of one that leaves is gone.
	taken chan struct{}
}

func newAttendance() *attendance {
	return &attendance{there: make(map[string]store.Presence), arrivals: make(chan arrival, maxArrivals)}
}

// runPresences keeps the records of those who report to this server, and follows those of all, until ctx ends.
func (c *Control) runPresences(ctx context.Context) {
	if c.presences == nil {
		return
	}
	var g errgroup.Group
	g.Go(func() error { return c.presences.WatchPresences(ctx, c.presenceWatcher()) })
	g.Go(func() error {
		(&keeper{control: c, stays: make(map[sandbox.Member]*stay), removed: make(map[sandbox.Member]<-chan struct{})}).run(ctx)
		return nil
	})
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		c.log.LogAttrs(ctx, slog.LevelError, "nodes and proxies are not followed: nothing counts as idle any more", errAttr(err))
	}
}

// presenceWatcher expects reports of every proxy that has a record, and of no other; a node of before this server started is
// down only without one.
func (c *Control) presenceWatcher() store.Watcher[store.Presence] {
	return store.Watcher[store.Presence]{
		Reset: func(records []store.Record[store.Presence], _ int64) {
			named := make(map[sandbox.Member]bool, len(records))
			for _, r := range records {
				named[sandbox.Member{Role: r.Value.Role, ID: r.Value.ID}] = true
				c.present(r.Value)
			}
			for id := range c.attendance.all() {
				if m := (sandbox.Member{Role: sandbox.RoleProxy, ID: id}); !named[m] {
					c.absent(m)
				}
			}
			c.activity.loaded()
		},
		Put: func(r store.Record[store.Presence]) { c.present(r.Value) },
		Delete: func(name string, _ int64) {
			role, id, _ := strings.Cut(name, "/")
			c.absent(sandbox.Member{Role: sandbox.Role(role), ID: id})
		},
	}
}

// present takes a record.
func (c *Control) present(p store.Presence) {
	switch p.Role {
	case sandbox.RoleNode:
		c.fleet.leased(sandbox.NodeID(p.ID), true, time.Now())
	case sandbox.RoleProxy:
		c.attendance.mu.Lock()
		c.attendance.there[p.ID] = p
		c.attendance.mu.Unlock()
		c.activity.expect(p.ID)
	case sandbox.RoleServer:
	}
}

// absent takes the end of a record.
func (c *Control) absent(m sandbox.Member) {
	switch m.Role {
	case sandbox.RoleNode:
		c.fleet.leased(sandbox.NodeID(m.ID), false, time.Now())
	case sandbox.RoleProxy:
		c.attendance.mu.Lock()
		delete(c.attendance.there, m.ID)
		c.attendance.mu.Unlock()
		c.activity.gone(m.ID)
	case sandbox.RoleServer:
	}
}

// all returns the proxies that are there, by id.
func (a *attendance) all() map[string]store.Presence {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.there)
}

// arrive takes a sign of life. It returns at once, or, of one that leaves, when its record is gone.
func (a *attendance) arrive(ctx context.Context, v arrival) error {
	select {
	case a.arrivals <- v:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !v.leaving {
		return nil
	}
	select {
	case <-v.taken:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keeper keeps the records of those who report to this server. One goroutine has it.
type keeper struct {
	control *Control
	stays   map[sandbox.Member]*stay
	// removed is closed once the record of one that left is gone: one that is back waits for that.
	removed map[sandbox.Member]<-chan struct{}
	keeping sync.WaitGroup
}

// stay is the keeping of one record.
type stay struct {
	presence store.Presence
	within   time.Duration
	heard    time.Time
	end      context.CancelFunc
	ended    chan struct{}
}

// run keeps records until ctx ends; they stay for whoever takes over.
func (k *keeper) run(ctx context.Context) {
	defer k.keeping.Wait()
	tick := time.NewTicker(silenceEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			maps.DeleteFunc(k.stays, func(_ sandbox.Member, s *stay) bool { return s.silent(now) })
		case v := <-k.control.attendance.arrivals:
			k.take(ctx, v)
		}
	}
}

// silent ends the keeping of a record whose owner has given no sign of life in time.
func (s *stay) silent(now time.Time) bool {
	if now.Sub(s.heard) <= s.within {
		return false
	}
	s.end()
	return true
}

// take takes one sign of life.
func (k *keeper) take(ctx context.Context, v arrival) {
	id := sandbox.Member{Role: v.presence.Role, ID: v.presence.ID}
	s := k.stays[id]
	switch {
	case v.leaving:
		delete(k.stays, id)
		k.removed[id] = v.taken
		k.keeping.Go(func() { k.remove(ctx, s, v) })
		return
	case s != nil && s.presence != v.presence: // it has started anew
		s.end()
		s = nil
	}
	if s == nil {
		s = k.keep(ctx, id, v)
		k.stays[id] = s
	}
	s.heard = time.Now()
}

// keep begins to keep a record.
func (k *keeper) keep(ctx context.Context, id sandbox.Member, v arrival) *stay {
	ctx, cancel := context.WithCancel(ctx)
	p := v.presence
	s := &stay{presence: p, within: v.within, end: cancel, ended: make(chan struct{})}
	before := k.removed[id]
	delete(k.removed, id)
	k.keeping.Go(func() {
		defer close(s.ended)
		defer cancel()
		if before != nil {
			<-before
		}
		if p.Name == "" {
			p.Name = k.control.memberName(ctx, id)
		}
		if err := k.control.presences.Attend(ctx, p, v.ttl); err != nil && ctx.Err() == nil {
			k.control.log.LogAttrs(ctx, slog.LevelError, "the record of a member that is there is not kept", slog.String("member", id.String()), errAttr(err))
		}
	})
	return s
}

// remove takes the record away of one that leaves, once nobody keeps it.
func (k *keeper) remove(ctx context.Context, s *stay, v arrival) {
	defer close(v.taken)
	if s != nil {
		s.end()
		<-s.ended
	}
	m := sandbox.Member{Role: v.presence.Role, ID: v.presence.ID}
	if err := k.control.presences.RemovePresence(ctx, m); err != nil && ctx.Err() == nil {
		k.control.log.LogAttrs(ctx, slog.LevelWarn, "the record of a member that leaves stays until its lease ends", slog.String("member", m.String()), errAttr(err))
	}
}

// memberName is what a member was called when it joined; empty where that is not known.
func (c *Control) memberName(ctx context.Context, m sandbox.Member) string {
	if c.joining.members == nil {
		return ""
	}
	known, err := c.joining.members.Member(ctx, m)
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		c.log.LogAttrs(ctx, slog.LevelWarn, "name of a member not read", slog.String("member", m.String()), errAttr(err))
	}
	return known.Name
}

// beat notes that a node gave a sign of life: its lease goes on. Where too many wait, the next one will do.
func (c *Control) beat(n *sandbox.Node, epoch int64) {
	if c.presences == nil {
		return
	}
	p := store.Presence{
		Role: sandbox.RoleNode, ID: string(n.ID), Name: n.Name, Address: n.Address, Version: n.Version, Epoch: epoch,
		Since: time.Unix(0, epoch).UTC(), // which an epoch is, or a little later
	}
	within := c.limits.SuspectAfter
	select {
	case c.attendance.arrivals <- arrival{presence: p, within: within, ttl: max(c.limits.DownAfter-within, store.LeastTTL)}:
	default:
	}
}

// dismiss takes the record of a node or a proxy away that is no member any more.
func (c *Control) dismiss(ctx context.Context, m sandbox.Member) {
	if m.Role == sandbox.RoleProxy {
		c.activity.forget(m.ID)
	}
	if c.presences == nil {
		return
	}
	v := arrival{presence: store.Presence{Role: m.Role, ID: m.ID}, leaving: true, taken: make(chan struct{})}
	if err := c.attendance.arrive(ctx, v); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "the record of a member that left stays until its lease ends", slog.String("member", m.String()), errAttr(err))
	}
}
