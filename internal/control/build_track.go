package control

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxTracked is how many builds are remembered beside those under way.
const maxTracked = 1024

// builds knows what this server does for builds, and which node carries out which. What it forgets is found again by
// asking the nodes.
type builds struct {
	// queue hands builds to Run. It never blocks: it is as long as there may be builds under way.
	queue chan task
	// most is how many builds and pushes may be under way at once.
	most int

	mu     sync.Mutex
	known  map[string]*tracked
	active int
}

// task is a build to follow. message is set where it still has to be sent to its node, with what goes before.
type task struct {
	template sandbox.TemplateID
	build    string
	message  *agentv1.BuildRequest
	// files are the uploads to send first.
	files []string
	// substitute is started from where the sources cannot be had.
	substitute *sandbox.Build
	// release lets go of what the task holds.
	release func()
}

// tracked is one build. What the server itself does for it comes before the node's part: step and lead tell of it.
type tracked struct {
	node   sandbox.NodeID // empty until the node's part begins
	active bool
	step   string
	lead   []LogEntry
	cancel context.CancelFunc // of the server's part
}

func newBuilds(most int) *builds {
	return &builds{queue: make(chan task, most), most: most, known: make(map[string]*tracked)}
}

// begin notes a build that is under way from now on. Errors: ErrExhausted.
func (b *builds) begin(id string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.active >= b.most {
		return sandbox.Exhaustedf("%d builds are under way, which is the most at once: try again when one of them is done", b.active)
	}
	b.active++
	b.trackedOf(id).active = true
	return nil
}

// end notes that a build is under way no longer.
func (b *builds) end(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if t := b.known[id]; t != nil && t.active {
		t.active, t.cancel = false, nil
		b.active--
	}
}

// trackedOf requires mu.
func (b *builds) trackedOf(id string) *tracked {
	if t := b.known[id]; t != nil {
		return t
	}
	if len(b.known) >= maxTracked+b.most {
		maps.DeleteFunc(b.known, func(_ string, t *tracked) bool { return !t.active })
	}
	t := &tracked{}
	b.known[id] = t
	return t
}

// look returns what is known of a build, the zero value where that is nothing.
func (b *builds) look(id string) tracked {
	b.mu.Lock()
	defer b.mu.Unlock()
	if t := b.known[id]; t != nil {
		return *t
	}
	return tracked{}
}

// set notes which node carries out a build.
func (b *builds) set(id string, node sandbox.NodeID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.trackedOf(id).node = node
}

// onCancel notes how the server's own part of a build is given up.
func (b *builds) onCancel(id string, cancel context.CancelFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.trackedOf(id).cancel = cancel
}

// say adds lines to the server's part of a build's log.
func (b *builds) say(id, step string, lines ...LogEntry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.trackedOf(id)
	t.step = step
	t.lead = append(slices.Clip(t.lead), lines...) // readers have the old one
}

func line(level, message string) LogEntry {
	return LogEntry{Time: time.Now().UTC(), Level: level, Logger: "build", Message: message}
}

// preparing reports whether the server's part of a build is not done yet.
func (t tracked) preparing() bool { return t.active && t.node == "" }
