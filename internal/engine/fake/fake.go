// Package fake is an engine in memory, for tests of what sits above an engine.
//
// It owns guests that do nothing but exist and hold two texts, as memory and as files: they run until they are stopped, or
// until a test ends them. Checkpoints are small files on the real disk. A Host is the machine; it outlives the Engines made
// over it, so that a new Engine over the same Host imitates a restarted node. It starts no goroutine and reads the clock only
// through package time, so that testing/synctest controls it. Host and Engine are safe for concurrent use; Host.mu guards
// everything.
package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const firstPID = 1000

// Host is an imaginary machine.
type Host struct {
	mu      sync.Mutex
	guests  map[sandbox.ID]*guest
	nextPID int
	onStart func(engine.Spec) (*engine.Exit, error)
	onSave  func(sandbox.ID, engine.SaveSpec) error
	// latency is how long a start takes.
	latency time.Duration
}

// guest is one guest of a Host.
type guest struct {
	spec    engine.Spec
	pid     int
	started time.Time
	usage   *engine.Stats
	ended   chan struct{} // closed with exit set
	exit    engine.Exit

	contents   Contents
	stillSince time.Time // zero while it does not stand still
	stoodFor   time.Duration
}

// NewHost returns a machine without guests.
func NewHost() *Host { return &Host{guests: map[sandbox.ID]*guest{}, nextPID: firstPID} }

// OnStart sets what happens at each later start, in place of nothing: an error fails it, an Exit ends the guest as soon as
// it runs. Nil sets nothing again.
func (h *Host) OnStart(f func(engine.Spec) (*engine.Exit, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onStart = f
}

// SetLatency sets how long later starts take.
func (h *Host) SetLatency(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.latency = d
}

// End ends a guest in the given way, whatever it is doing. A guest that is not running is ErrNotFound.
func (h *Host) End(id sandbox.ID, exit engine.Exit) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	if g == nil || !g.running() {
		return notFound(id)
	}
	g.end(exit)
	return nil
}

// OOM ends a guest as if it had used more memory than its limit.
func (h *Host) OOM(id sandbox.ID) error {
	h.mu.Lock()
	limit := int64(0)
	if g := h.guests[id]; g != nil {
		limit = g.spec.Limits.MemoryBytes
	}
	h.mu.Unlock()
	return h.End(id, engine.Exit{
		Code: -1, OOM: true, Reason: fmt.Sprintf("out of memory: the limit is %d MiB", limit>>20),
	})
}

// Crash ends a guest as if its engine had failed.
func (h *Host) Crash(id sandbox.ID) error {
	return h.End(id, engine.Exit{Code: -1, Reason: "the sentry was killed by signal 9 (killed)"})
}

// SetUsage sets what Stats says of a guest from now on; Time is filled in at each call.
func (h *Host) SetUsage(id sandbox.ID, s engine.Stats) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	if g == nil {
		return notFound(id)
	}
	g.usage = &s
	return nil
}

// Spec returns what a guest was started with.
func (h *Host) Spec(id sandbox.ID) (engine.Spec, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	if g == nil {
		return engine.Spec{}, false
	}
	return g.spec, true
}

func (g *guest) running() bool {
	select {
	case <-g.ended:
		return false
	default:
		return true
	}
}

// end ends a running guest. The Host must be locked.
func (g *guest) end(exit engine.Exit) {
	if exit.At.IsZero() {
		exit.At = time.Now()
	}
	g.exit = exit
	close(g.ended)
}

// Engine is an engine.Engine over a Host.
type Engine struct{ host *Host }

var _ engine.Engine = (*Engine)(nil)

// New returns an engine over h, where it finds the guests that earlier engines started.
func New(h *Host) *Engine { return &Engine{host: h} }

// Caps says that the engine is a fake.
func (e *Engine) Caps() engine.Caps {
	return engine.Caps{Name: saveName, Version: saveVersion, Capabilities: []string{
		"disk_limit", "memory_limit", "cpu_limit", "save_memory", "save_files", "save_layer",
	}}
}

// Start makes a guest. See engine.Engine.
func (e *Engine) Start(ctx context.Context, spec engine.Spec) error {
	if err := spec.Check(); err != nil {
		return err
	}
	h := e.host
	h.mu.Lock()
	latency, onStart := h.latency, h.onStart
	h.mu.Unlock()
	if err := pause(ctx, latency); err != nil {
		return err
	}
	contents, err := contentsOf(spec)
	if err != nil {
		return fmt.Errorf("start guest %s: %w", spec.ID, err)
	}
	var exit *engine.Exit
	if onStart != nil {
		if exit, err = onStart(spec); err != nil {
			return fmt.Errorf("start guest %s: %w", spec.ID, err)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.guests[spec.ID] != nil {
		return sandbox.Conflictf("sandbox %s exists already", spec.ID)
	}
	h.nextPID++
	spec.Args, spec.Env = slices.Clone(spec.Args), slices.Clone(spec.Env)
	g := &guest{spec: spec, pid: h.nextPID, started: time.Now(), ended: make(chan struct{}), contents: contents}
	h.guests[spec.ID] = g
	g.stand(spec.Hold)
	if exit != nil {
		g.end(*exit)
	}
	return nil
}

// pause waits for d, or for the end of ctx.
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return ctx.Err()
	}
}

// Stop ends a guest. See engine.Engine.
func (e *Engine) Stop(_ context.Context, id sandbox.ID) error {
	if _, err := sandbox.ParseID(string(id)); err != nil {
		return err
	}
	h := e.host
	h.mu.Lock()
	defer h.mu.Unlock()
	if g := h.guests[id]; g != nil && g.running() {
		g.end(engine.Exit{Code: -1, Reason: "stopped"})
	}
	delete(h.guests, id)
	return nil
}

// List returns the guests that exist. See engine.Engine.
func (e *Engine) List(ctx context.Context) ([]engine.Guest, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h := e.host
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []engine.Guest
	for _, id := range slices.Sorted(maps.Keys(h.guests)) {
		item := engine.Guest{ID: id}
		if g := h.guests[id]; g.running() {
			item.Running, item.PID = true, g.pid
		}
		out = append(out, item)
	}
	return out, nil
}

// Wait blocks until a guest has ended. See engine.Engine.
func (e *Engine) Wait(ctx context.Context, id sandbox.ID) (engine.Exit, error) {
	e.host.mu.Lock()
	g := e.host.guests[id]
	e.host.mu.Unlock()
	if g == nil {
		return engine.Exit{}, notFound(id)
	}
	select {
	case <-ctx.Done():
		return engine.Exit{}, fmt.Errorf("wait for %s: %w", id, ctx.Err())
	case <-g.ended:
		return g.exit, nil
	}
}

// Stats returns what a guest uses: what SetUsage said, or else a little, growing with its age. See engine.Engine.
func (e *Engine) Stats(_ context.Context, id sandbox.ID) (engine.Stats, error) {
	h := e.host
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	if g == nil {
		return engine.Stats{}, notFound(id)
	}
	now := time.Now()
	s := engine.Stats{CPUTime: g.active(now) / 100, MemoryBytes: 16 << 20, DiskBytes: 1 << 20}
	if g.usage != nil {
		s = *g.usage
	}
	s.Time = now
	return s, nil
}

func notFound(id sandbox.ID) error { return sandbox.NotFoundf("sandbox %s does not run here", id) }
