package agent

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

var _ agentv1connect.AgentServiceHandler = (*Agent)(nil)

// Agent is a node. Make one with New, call Recover once, then Run.
type Agent struct {
	cfg      Config
	journal  *journal.Journal
	engine   engine.Engine
	network  network
	images   images
	saves    checkpoints
	servers  []*reporter // the first is the one that counts
	dial     func(ctx context.Context, network, address string) (net.Conn, error)
	log      *slog.Logger
	node     sandbox.NodeID
	metrics  *metrics
	gate     *gate
	crew     *crew
	builds   *builds
	files    *buildFiles
	peers    peers       // nil: none
	bucket   bucketStore // nil: none
	moves    *transfers
	pressure gauge
	clock    *clock
	used     *meter

	wake     chan struct{}             // of capacity 1: the plan may have changed
	secret   atomic.Pointer[[]byte]    // nil until it is known
	short    atomic.Int64              // creates that have found no room and see what can give way
	acked    atomic.Int64              // the last change that the server is known to have
	cordoned atomic.Bool               // the server says that the node gets no new sandboxes
	decided  atomic.Pointer[time.Time] // until when a server sees to the ends of sandboxes; nil: none has said so

	mu      sync.RWMutex
	all     map[sandbox.ID]*instance
	byKey   map[string]*flight
	pools   map[poolKey]*pool
	garbage map[string]*garbage // images that no template needs, by their digest
}

// New returns an Agent that does nothing yet.
func New(cfg Config, d Deps) (*Agent, error) {
	switch {
	case d.Journal == nil || d.Engine == nil || d.Network == nil || d.Images == nil || d.Snapshots == nil || d.Server == nil:
		return nil, sandbox.Invalidf("agent: journal, engine, network, images, snapshots and server are all needed")
	case cfg.ScratchDir == "":
		return nil, sandbox.Invalidf("agent: a scratch directory is needed")
	}
	if d.Dial == nil {
		d.Dial = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	}
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	cfg = withDefaults(cfg)
	a := &Agent{
		cfg: cfg, journal: d.Journal, engine: d.Engine, network: d.Network, images: d.Images, saves: d.Snapshots,
		dial: d.Dial, log: d.Logger, node: d.Journal.NodeID(),
		gate: newGate(cfg.MaxStarting, cfg.MaxWaiting), crew: newCrew(), builds: newBuilds(cfg.MaxBuilds), files: newBuildFiles(cfg.FilesDir), clock: newClock(cfg.SinceBoot),
		peers: d.Peers, bucket: d.Bucket, moves: newTransfers(),
		used: &meter{dir: cfg.ScratchDir}, wake: make(chan struct{}, 1),
		all: map[sandbox.ID]*instance{}, byKey: map[string]*flight{}, pools: map[poolKey]*pool{},
		garbage: map[string]*garbage{},
	}
	if d.RememberSecret == nil {
		d.RememberSecret = func([]byte) error { return nil }
	}
	a.servers = append(a.servers, newReporter(a, d.Server, d.RememberSecret))
	if d.Local != nil {
		a.servers = append(a.servers, newReporter(a, d.Local, nil))
	}
	if len(cfg.TokenSecret) > 0 {
		a.secret.Store(&cfg.TokenSecret)
	}
	a.acked.Store(d.Journal.Ledger().Acknowledged)
	var err error
	if a.metrics, err = newMetrics(a, d.Registerer); err != nil {
		return nil, err
	}
	return a, nil
}

// NodeID returns the node's id.
func (a *Agent) NodeID() sandbox.NodeID { return a.node }

// Run registers with the server, reports to it, and keeps the sandboxes as they should be, until ctx ends. Sandboxes are
// left running. It returns when everything that it or a command started has exited.
func (a *Agent) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.reconcile(ctx) })
	for _, r := range a.servers {
		g.Go(func() error { return r.run(ctx) })
	}
	g.Go(func() error { return a.sample(ctx) })
	g.Go(func() error { return a.sweepParts(ctx) })
	err := g.Wait()
	a.crew.stop()
	a.closeIdle()
	return err
}

// closeIdle closes the connections that are kept to warm sandboxes.
func (a *Agent) closeIdle() {
	for _, in := range a.instances() {
		in.dropGuest()
	}
}

// get returns the instance with the id.
func (a *Agent) get(id sandbox.ID) (*instance, bool) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	in, ok := a.all[id]
	return in, ok
}

// visible returns the instance with the id, if somebody has been told of it.
func (a *Agent) visible(text string) (*instance, error) {
	id, err := sandbox.ParseID(text)
	if err != nil {
		return nil, err
	}
	in, ok := a.get(id)
	if !ok || in.record().State == sandbox.StateCreating {
		return nil, sandbox.NotFoundf("sandbox %s is not on node %s", id, a.node)
	}
	return in, nil
}

// instances returns all of them, in no order.
func (a *Agent) instances() []*instance {
	a.mu.RLock()
	defer a.mu.RUnlock()
	out := make([]*instance, 0, len(a.all))
	for _, in := range a.all {
		out = append(out, in)
	}
	return out
}

// drop forgets an instance.
func (a *Agent) drop(in *instance) {
	key := in.record().IdempotencyKey
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, in.id)
	if f, ok := a.byKey[key]; ok && f.in == in {
		delete(a.byKey, key)
	}
}

// put writes an instance's record to the journal, then to the instance.
//
// Preconditions: the caller holds in.op.
func (a *Agent) put(ctx context.Context, in *instance, r journal.Record, changes ...journal.Change) error {
	old := in.record()
	a.clock.stamp(&old, &r)
	r, err := a.journal.Put(ctx, r, changes...)
	if err != nil {
		return err
	}
	in.set(&r)
	a.poke()
	if len(changes) > 0 {
		a.announce()
	}
	return nil
}

// putDurable writes a change to the record that no server needs to hear of, and that must not be forgotten.
//
// Preconditions: the caller holds in.op.
func (a *Agent) putDurable(ctx context.Context, in *instance, r journal.Record) error {
	r, err := a.journal.PutDurable(ctx, r)
	if err == nil {
		in.set(&r)
	}
	return err
}

// announce makes the servers be told what is new.
func (a *Agent) announce() {
	for _, r := range a.servers {
		signal(r.news)
	}
}

// poke makes the reconcile loop look again.
func (a *Agent) poke() { signal(a.wake) }

// release gives an instance's op back.
func (a *Agent) release(in *instance) {
	<-in.op
	a.poke()
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// now returns the present in the form that records keep.
func now() time.Time { return time.Now().UTC().Round(0) }
