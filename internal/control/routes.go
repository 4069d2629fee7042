package control

import (
	"crypto/rand"
	"sync"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// ringLen is how many changes of routes are kept for those who follow them. Who is further behind gets everything anew.
const ringLen = 1 << 16

// routeChange names what has changed: a sandbox or a node. What it is now is in the index, or in routeLog.nodes.
type routeChange struct {
	id   sandbox.ID
	node sandbox.NodeID
}

// routeLog numbers the changes of routes. It keeps the last ringLen names of what has changed and nothing for those who
// follow it, so that no follower can hold it up or make it grow. A nil log takes changes and keeps none.
//
// routeLog.mu comes after index.mu and fleet.mu.
type routeLog struct {
	// table names this log: numbers of another mean nothing here.
	table string

	mu sync.Mutex
	// version is the number of the newest change; change v is ring[v%ringLen].
	version int64
	ring    []routeChange
	nodes   map[sandbox.NodeID]sandbox.NodeRoute
	// heard is since which change it is known what runs on a node.
	heard   map[sandbox.NodeID]int64
	news    chan struct{} // closed by the next change; nil while nobody waits
	waiting map[sandbox.ID]*routeWaiters
}

// routeWaiters wait for news of one sandbox.
type routeWaiters struct {
	n    int
	news chan struct{} // closed when there is some
}

func newRouteLog() *routeLog {
	return &routeLog{
		table: rand.Text(), version: 1, ring: make([]routeChange, ringLen),
		nodes: make(map[sandbox.NodeID]sandbox.NodeRoute), heard: make(map[sandbox.NodeID]int64), waiting: make(map[sandbox.ID]*routeWaiters),
	}
}

// changed notes that a sandbox is new or another, where that changes its route. old is nil for a new one.
func (l *routeLog) changed(old, now *entry) {
	if l == nil || old != nil && old.box.Route() == now.box.Route() {
		return
	}
	l.note(now.box.ID)
}

// note notes that a sandbox's route is another, or forgotten.
func (l *routeLog) note(id sandbox.ID) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.appendLocked(routeChange{id: id})
	if w := l.waiting[id]; w != nil {
		delete(l.waiting, id)
		close(w.news)
	}
}

// setNode notes how a node is reached.
func (l *routeLog) setNode(n sandbox.NodeRoute) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	known, ok := l.nodes[n.ID]
	if ok && known == n {
		return
	}
	l.nodes[n.ID] = n
	l.appendLocked(routeChange{node: n.ID})
	if !n.Unheard && (!ok || known.Unheard) {
		l.heard[n.ID] = l.version
	}
}

// dropNode notes that a node has left the cluster.
func (l *routeLog) dropNode(id sandbox.NodeID) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.nodes, id)
	delete(l.heard, id)
	l.appendLocked(routeChange{node: id})
}

func (l *routeLog) appendLocked(c routeChange) {
	l.version++
	l.ring[l.version%ringLen] = c
	if l.news != nil {
		close(l.news)
		l.news = nil
	}
}

// now returns the number of the newest change.
func (l *routeLog) now() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.version
}

// after returns a channel that is closed once there is a change beyond version.
func (l *routeLog) after(version int64) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.version > version {
		there := make(chan struct{})
		close(there)
		return there
	}
	if l.news == nil {
		l.news = make(chan struct{})
	}
	return l.news
}

// has reports whether every change beyond version is still kept.
func (l *routeLog) has(version int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hasLocked(version)
}

func (l *routeLog) hasLocked(version int64) bool {
	return version > 0 && version <= l.version && l.version-version < ringLen
}

// routeBatch is changes, each named once.
type routeBatch struct {
	sandboxes []sandbox.ID
	nodes     []sandbox.NodeID
	// upTo is the number of the last change in it.
	upTo int64
}

// copied is how many changes are taken from the ring at a time.
const copied = 4 * partLen

// since returns the changes beyond version, at most partLen different ones. It is false where some of them are not kept
// any more.
func (l *routeLog) since(version int64) (routeBatch, bool) {
	raw, ok := l.copySince(version)
	b := routeBatch{upTo: version}
	seen := make(map[routeChange]struct{}, min(len(raw), partLen))
	for i, c := range raw {
		if len(seen) == partLen {
			break
		}
		b.upTo = version + int64(i) + 1
		if _, again := seen[c]; again {
			continue
		}
		seen[c] = struct{}{}
		if c.node != "" {
			b.nodes = append(b.nodes, c.node)
		} else {
			b.sandboxes = append(b.sandboxes, c.id)
		}
	}
	return b, ok
}

func (l *routeLog) copySince(version int64) ([]routeChange, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.hasLocked(version) {
		return nil, false
	}
	raw := make([]routeChange, 0, min(copied, l.version-version))
	for v := version + 1; v <= l.version && len(raw) < copied; v++ {
		raw = append(raw, l.ring[v%ringLen])
	}
	return raw, true
}

// node returns how a node is reached; false: it is not in the cluster.
func (l *routeLog) node(id sandbox.NodeID) (sandbox.NodeRoute, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, ok := l.nodes[id]
	return n, ok
}

// nodeFor returns how a node is reached, for a follower who has the changes up to version: to one who has not got all that
// the node told, it is unheard.
func (l *routeLog) nodeFor(id sandbox.NodeID, version int64) (sandbox.NodeRoute, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, ok := l.nodes[id]
	n.Unheard = n.Unheard || l.heard[id] > version
	return n, ok
}

// allNodes returns how every node is reached, for a follower who has the changes up to version.
func (l *routeLog) allNodes(version int64) []sandbox.NodeRoute {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]sandbox.NodeRoute, 0, len(l.nodes))
	for id, n := range l.nodes {
		n.Unheard = n.Unheard || l.heard[id] > version
		out = append(out, n)
	}
	return out
}

// await registers for news of a sandbox; a leave follows unless the news has come.
func (l *routeLog) await(id sandbox.ID) *routeWaiters {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.waiting[id]
	if w == nil {
		w = &routeWaiters{news: make(chan struct{})}
		l.waiting[id] = w
	}
	w.n++
	return w
}

func (l *routeLog) leave(id sandbox.ID, w *routeWaiters) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.n--; w.n == 0 && l.waiting[id] == w {
		delete(l.waiting, id)
	}
}
