package control

import (
	"context"
	"sync"
	"time"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// partLen is how many routes a message holds at most.
	partLen = 1000
	// watchPace is the least time between two messages of changes: what changes within it is sent once.
	watchPace = 5 * time.Millisecond
	// watchBeat is how often a follower is told, when nothing changes, that the server is there.
	watchBeat = 5 * time.Second
	// tableFresh is for how long a whole table is given to others who ask.
	tableFresh = time.Second
)

// watchRoutes sends the routing table, or what has changed in it since the version that the caller has, and then every
// change until ctx ends or send fails, whose error it returns. A caller that takes its time holds up nobody but itself.
func (c *Control) watchRoutes(ctx context.Context, req *proxyv1.WatchRequest, send func(*proxyv1.WatchResponse) error) error {
	at := req.GetVersion()
	if req.GetTable() != c.routes.table {
		at = 0
	}
	for {
		batch, ok := c.routes.since(at)
		switch {
		case !ok:
			upTo, err := c.sendTable(send)
			if err != nil {
				return err
			}
			at = upTo
			continue
		case batch.upTo > at || at == req.GetVersion(): // one message at least, so that the caller knows that it is up to date
			if err := send(c.deltaOf(batch)); err != nil {
				return err
			}
			at = batch.upTo
			req = nil
		}
		if err := c.awaitRoutes(ctx, at, send); err != nil {
			return err
		}
	}
}

// awaitRoutes waits for a change beyond version, and says meanwhile that the server is there.
func (c *Control) awaitRoutes(ctx context.Context, version int64, send func(*proxyv1.WatchResponse) error) error {
	pace := time.NewTimer(watchPace)
	defer pace.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-pace.C:
	}
	beat := time.NewTicker(watchBeat)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.routes.after(version):
			return nil
		case <-beat.C:
		}
		if err := send(&proxyv1.WatchResponse{Table: c.routes.table, Version: version}); err != nil {
			return err
		}
	}
}

// deltaOf says what the things that changed are now.
func (c *Control) deltaOf(b routeBatch) *proxyv1.WatchResponse {
	msg := &proxyv1.WatchResponse{Table: c.routes.table, Version: b.upTo}
	for _, id := range b.sandboxes {
		if box, ok := c.index.get(id); ok {
			msg.Routes = append(msg.Routes, routeToWire(box.Route()))
		} else {
			msg.Routes = append(msg.Routes, &proxyv1.Route{Id: string(id), Gone: true})
		}
	}
	for _, id := range b.nodes {
		if n, ok := c.routes.nodeFor(id, b.upTo); ok {
			msg.Nodes = append(msg.Nodes, nodeRouteToWire(n))
		} else {
			msg.Nodes = append(msg.Nodes, &proxyv1.Node{Id: string(id), Gone: true})
		}
	}
	return msg
}

// sendTable sends everything and returns the version up to which that is true.
func (c *Control) sendTable(send func(*proxyv1.WatchResponse) error) (int64, error) {
	t := c.whole.get(c)
	for _, part := range t.parts {
		if err := send(part); err != nil {
			return 0, err
		}
	}
	return t.version, nil
}

// wholeTable is a routing table as it is sent. It is never written.
type wholeTable struct {
	parts   []*proxyv1.WatchResponse
	version int64
	made    time.Time
}

// wholeTables makes whole tables, one at a time, for all who ask at about the same time.
type wholeTables struct {
	mu   sync.Mutex
	last wholeTable
}

func (w *wholeTables) get(c *Control) wholeTable {
	w.mu.Lock()
	defer w.mu.Unlock()
	if time.Since(w.last.made) > tableFresh || !c.routes.has(w.last.version) {
		w.last = c.makeTable()
	}
	return w.last
}

// prune lets go of a table that nobody asks for any more.
func (w *wholeTables) prune() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if time.Since(w.last.made) > tableFresh {
		w.last = wholeTable{}
	}
}

// makeTable reads the index. What changes meanwhile may be in it or not: it has a number beyond the table's version.
func (c *Control) makeTable() wholeTable {
	t := wholeTable{version: c.routes.now(), made: time.Now()}
	part := &proxyv1.WatchResponse{Table: c.routes.table, Snapshot: true}
	for _, n := range c.routes.allNodes(t.version) {
		part.Nodes = append(part.Nodes, nodeRouteToWire(n))
	}
	first, _ := ends()
	c.index.scan(false, first, func(e *entry) bool {
		if len(part.GetRoutes()) == partLen {
			t.parts = append(t.parts, part)
			part = &proxyv1.WatchResponse{Table: c.routes.table, Snapshot: true}
		}
		part.Routes = append(part.Routes, routeToWire(e.box.Route()))
		return true
	})
	part.Version = t.version
	t.parts = append(t.parts, part)
	return t
}

// Follower is told how routes change, by one goroutine at a time. Its methods must not block.
type Follower interface {
	Changed(r sandbox.Route)
	NodeDown(id sandbox.NodeID)
}

// followRoutes tells f of every change from now on until ctx ends: of what changes often, of its last state.
func (c *Control) followRoutes(ctx context.Context, f Follower) {
	at := c.routes.now()
	for {
		batch, ok := c.routes.since(at)
		if !ok { // it was held up for 65,536 changes
			batch = routeBatch{upTo: c.routes.now()}
			first, _ := ends()
			c.index.scan(false, first, func(e *entry) bool { batch.sandboxes = append(batch.sandboxes, e.box.ID); return true })
		}
		at = batch.upTo
		for _, id := range batch.nodes {
			if n, known := c.routes.node(id); !known || n.Down {
				f.NodeDown(id)
			}
		}
		for _, id := range batch.sandboxes {
			r := sandbox.Route{ID: id, State: sandbox.StateDeleted}
			if box, known := c.index.get(id); known {
				r = box.Route()
			}
			f.Changed(r)
		}
		select {
		case <-ctx.Done():
			return
		case <-c.routes.after(at):
		}
	}
}
