package routes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// minPause and maxPause bound the time between two attempts to follow a server; it doubles and is spread by half.
	minPause = 50 * time.Millisecond
	maxPause = 2 * time.Second
	// maxSilence is how long a server may send nothing: it says at least every 5 s that it is there.
	maxSilence = 20 * time.Second
)

var errSilent = errors.New("the server has said nothing for too long")

// follow follows the server until ctx ends.
func (t *Table) follow(ctx context.Context, tr traffic) {
	for pause := minPause; ctx.Err() == nil; pause = min(2*pause, maxPause) {
		heard, err := t.watch(ctx, tr)
		if ctx.Err() != nil {
			return
		}
		t.broke(ctx, err)
		if heard {
			pause = minPause
		}
		wait := time.NewTimer(pause/2 + rand.N(pause)) //nolint:gosec // spreads load, guards nothing
		select {
		case <-ctx.Done():
			wait.Stop()
		case <-wait.C:
		}
	}
}

// broke notes that no server is followed any more. What the table holds stays.
func (t *Table) broke(ctx context.Context, err error) {
	t.mu.Lock()
	first := t.staleSince.IsZero()
	if first {
		t.staleSince = time.Now()
	}
	t.mu.Unlock()
	t.metrics.broken.Inc()
	if first {
		t.log.LogAttrs(ctx, slog.LevelWarn, "routing table not followed", slog.Any("err", err))
	}
}

// watch takes what one stream of the server brings, until it breaks. heard tells whether it brought anything.
func (t *Table) watch(ctx context.Context, tr traffic) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(maxSilence, func() { cancel(errSilent) })
	defer silence.Stop()
	t.mu.RLock()
	req := &proxyv1.WatchRequest{Table: t.name, Version: t.version}
	t.mu.RUnlock()
	stream, err := t.server.Watch(ctx, req)
	if err != nil {
		return false, fmt.Errorf("watch routes: %w", fromServer(ctx, err))
	}
	defer func() { _ = stream.Close() }() // it has ended, or ctx ends it
	var whole *whole
	for stream.Receive() {
		silence.Reset(maxSilence)
		heard = true
		whole = t.take(ctx, tr, stream.Msg(), whole)
	}
	if cause := context.Cause(ctx); cause != nil {
		return heard, cause
	}
	return heard, fmt.Errorf("watch routes: %w", fromServer(ctx, stream.Err()))
}

// whole is what a snapshot that goes on has named so far: what it does not name is gone at its end.
type whole struct {
	routes map[sandbox.ID]struct{}
	nodes  map[sandbox.NodeID]struct{}
}

// take puts one message into the table and tells the proxy what has changed. It returns the snapshot that goes on.
func (t *Table) take(ctx context.Context, tr traffic, msg *proxyv1.WatchResponse, w *whole) *whole {
	if msg.GetSnapshot() && w == nil {
		w = &whole{routes: make(map[sandbox.ID]struct{}), nodes: make(map[sandbox.NodeID]struct{})}
	}
	changed, down := t.apply(ctx, msg, w)
	t.metrics.changes.Add(float64(len(msg.GetRoutes())))
	for _, id := range down {
		tr.NodeDown(id)
	}
	pausing := false
	for _, r := range changed {
		tr.Changed(r)
		pausing = pausing || r.State == sandbox.StatePausing
	}
	if pausing && msg.GetVersion() > 0 {
		t.prompted()
	}
	if msg.GetVersion() > 0 {
		return nil
	}
	return w
}

// apply puts one message into the table. It returns the routes that have changed, and the nodes that went down.
func (t *Table) apply(ctx context.Context, msg *proxyv1.WatchResponse, w *whole) (changed []sandbox.Route, down []sandbox.NodeID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, n := range msg.GetNodes() {
		if t.putNodeLocked(n, w) {
			down = append(down, sandbox.NodeID(n.GetId()))
		}
	}
	for _, one := range msg.GetRoutes() {
		if r, news := t.putRouteLocked(one, w); news {
			changed = append(changed, r)
		}
	}
	if msg.GetVersion() <= 0 {
		return changed, down
	}
	changed = append(changed, t.dropKeptLocked()...)
	if w != nil {
		changed = append(changed, t.dropUnnamedLocked(w)...)
		t.metrics.snapshots.Inc()
	}
	if !t.staleSince.IsZero() {
		t.log.LogAttrs(ctx, slog.LevelInfo, "routing table followed", slog.Int("sandboxes", len(t.routes)), slog.Bool("whole", w != nil))
	}
	t.name, t.version, t.synced, t.staleSince = msg.GetTable(), msg.GetVersion(), true, time.Time{}
	return changed, down
}

// putNodeLocked reports whether the node does not answer any more.
func (t *Table) putNodeLocked(n *proxyv1.Node, w *whole) bool {
	id := sandbox.NodeID(n.GetId())
	known, had := t.nodes[id]
	if n.GetGone() {
		delete(t.nodes, id)
		return had && !known.Down
	}
	if w != nil {
		w.nodes[id] = struct{}{}
	}
	t.nodes[id] = nodeFromWire(n)
	return n.GetDown() && (!had || !known.Down)
}

func (t *Table) putRouteLocked(one *proxyv1.Route, w *whole) (r sandbox.Route, news bool) {
	r = fromWire(one)
	delete(t.kept, r.ID)
	if one.GetGone() {
		_, had := t.routes[r.ID]
		delete(t.routes, r.ID)
		t.tellLocked(r.ID)
		return gone(r.ID), had
	}
	if w != nil {
		w.routes[r.ID] = struct{}{}
	}
	known := t.routes[r.ID]
	if r == known {
		return r, false
	}
	t.routes[r.ID] = r
	t.tellLocked(r.ID)
	return r, true
}

// dropKeptLocked forgets what was kept of nodes that have told since what runs there, or have left the cluster, and returns
// the routes of that.
func (t *Table) dropKeptLocked() []sandbox.Route {
	var dropped []sandbox.Route
	for id := range t.kept {
		if n, ok := t.nodes[t.routes[id].Node]; ok && n.Unheard {
			continue
		}
		delete(t.kept, id)
		delete(t.routes, id)
		t.tellLocked(id)
		dropped = append(dropped, gone(id))
	}
	return dropped
}

// dropUnnamedLocked forgets what a whole table did not name, unless that is because the server could not, and returns the
// routes of that.
func (t *Table) dropUnnamedLocked(w *whole) []sandbox.Route {
	var dropped []sandbox.Route
	for id := range t.nodes {
		if _, named := w.nodes[id]; !named {
			delete(t.nodes, id)
		}
	}
	for id, r := range t.routes {
		if _, named := w.routes[id]; named {
			continue
		}
		if t.nodes[r.Node].Unheard {
			t.kept[id] = struct{}{}
			continue
		}
		delete(t.routes, id)
		t.tellLocked(id)
		dropped = append(dropped, gone(id))
	}
	return dropped
}

// gone is the route of a sandbox of which nothing is known any more.
func gone(id sandbox.ID) sandbox.Route { return sandbox.Route{ID: id, State: sandbox.StateDeleted} }
