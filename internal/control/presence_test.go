package control_test

import (
	"context"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// fakePresences keeps which members are there, as the store does, in memory.
type fakePresences struct {
	mu      sync.Mutex
	there   map[string]leased
	watcher store.Watcher[store.Presence]
}

// leased is a record, and when its lease ends.
type leased struct {
	presence store.Presence
	ends     *time.Timer
}

func newPresences() *fakePresences { return &fakePresences{there: make(map[string]leased)} }

// Attend keeps a record until ctx ends, and for ttl longer.
func (p *fakePresences) Attend(ctx context.Context, one store.Presence, ttl time.Duration) error {
	name := sandbox.Member{Role: one.Role, ID: one.ID}.String()
	p.put(name, leased{presence: one, ends: time.AfterFunc(ttl, func() { p.remove(name) })})
	tick := time.NewTicker(ttl / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			p.mu.Lock()
			if l, ok := p.there[name]; ok {
				l.ends.Reset(ttl)
			}
			p.mu.Unlock()
		}
	}
}

func (p *fakePresences) put(name string, l leased) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.there[name]; ok {
		old.ends.Stop()
	}
	p.there[name] = l
	if p.watcher.Put != nil {
		p.watcher.Put(store.Record[store.Presence]{Name: name, Value: l.presence})
	}
}

// RemovePresence takes a record away.
func (p *fakePresences) RemovePresence(_ context.Context, m sandbox.Member) error {
	p.remove(m.String())
	return nil
}

func (p *fakePresences) remove(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l, ok := p.there[name]
	if !ok {
		return
	}
	l.ends.Stop()
	delete(p.there, name)
	if p.watcher.Delete != nil {
		p.watcher.Delete(name, 0)
	}
}

// WatchPresences feeds one watcher until ctx ends.
func (p *fakePresences) WatchPresences(ctx context.Context, w store.Watcher[store.Presence]) error {
	p.mu.Lock()
	var all []store.Record[store.Presence]
	for _, name := range slices.Sorted(maps.Keys(p.there)) {
		all = append(all, store.Record[store.Presence]{Name: name, Value: p.there[name].presence})
	}
	w.Reset(all, 0)
	p.watcher = w
	p.mu.Unlock()
	<-ctx.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watcher = store.Watcher[store.Presence]{}
	return ctx.Err()
}

// has returns a member's record.
func (p *fakePresences) has(name string) (store.Presence, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l, ok := p.there[name]
	return l.presence, ok
}

// TestNodesHaveLeases keeps a node's record for as long as its heart beats, over a restart of the server too.
func TestNodesHaveLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := newPresences()
		change := func(cfg *control.Config) {
			cfg.Presences = there
			impatient(cfg)
		}
		c := apitest.NewCluster(t, change)
		stop := serving(t, c.Control)
		beat := func() {
			t.Helper()
			if err := c.Report(t, c.Node, false); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		for range 20 {
			beat()
			asleep(2 * time.Second)
		}
		if p, ok := there.has("node/aaaaaa"); !ok || p.Name != "node-aaaaaa" || p.Epoch == 0 {
			t.Errorf("the record of a node that reports: %+v, %t", p, ok)
		}
		stop()
		c.Restart(t, change)
		serving(t, c.Control)
		if n := nodeOf(t, c, "aaaaaa"); n.State != sandbox.NodeSuspect {
			t.Errorf("known by its lease alone, it is %s", n.State)
		}
		asleep(16 * time.Second)
		if _, ok := there.has("node/aaaaaa"); ok {
			t.Error("the lease goes on without the node")
		}
		if n := nodeOf(t, c, "aaaaaa"); n.State != sandbox.NodeDown {
			t.Errorf("without its lease it is %s", n.State)
		}
		c.Join(t, c.Node)
		beat()
		if _, ok := there.has("node/aaaaaa"); !ok || nodeOf(t, c, "aaaaaa").State != sandbox.NodeReady {
			t.Error("it is back, and not ready")
		}
		if err := c.Control.RemoveNode(t.Context(), "aaaaaa", true); err != nil {
			t.Fatal(err)
		}
		asleep(time.Second)
	})
}
