package chaos

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Belief is what a client may rely on after its last operation with a sandbox.
type Belief string

// The beliefs.
const (
	// Running and Paused were acknowledged.
	Running Belief = "running"
	Paused  Belief = "paused"
	// Unsure follows a pause or resume whose answer was an error, or none: it is the one or the other.
	Unsure Belief = "unsure"
	// Doomed follows a kill without a good answer: it may be there or not.
	Doomed Belief = "doomed"
)

// Box is a sandbox as its client knows it.
type Box struct {
	ID     string
	Tag    string
	Token  string
	Belief Belief
	// Excused means that it ran on a machine when that lost its power: it may be lost.
	Excused bool
	// Ends is when it is to end by itself, and EndsBy when at the latest where nothing is in the way; zero means not soon.
	Ends, EndsBy time.Time
	// Pauses means that it is paused then.
	Pauses bool
	// Tried and Written are the numbers that were to be appended to its file, and those of which that was acknowledged.
	Tried   int
	Written []int
}

// Ledger is what the cluster has acknowledged. It is safe for concurrent use; a Box in it is its slot's.
type Ledger struct {
	mu sync.Mutex
	// boxes by slot; an empty slot has none.
	boxes map[int]Box
	// open are the tags of creates that were asked for, whatever the answer.
	open map[string]struct{}
	// dead are sandboxes whose kill was acknowledged.
	dead map[string]struct{}
	// excused are sandboxes that ran where the power failed.
	excused map[string]struct{}
	creates int
}

// NewLedger returns an empty one.
func NewLedger() *Ledger {
	return &Ledger{boxes: map[int]Box{}, open: map[string]struct{}{}, dead: map[string]struct{}{}, excused: map[string]struct{}{}}
}

// Tag returns a name for the next create, which is noted before it is asked for.
func (l *Ledger) Tag(slot int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.creates++
	tag := strconv.Itoa(slot) + "-" + strconv.Itoa(l.creates)
	l.open[tag] = struct{}{}
	return tag
}

// Get returns a slot's sandbox.
func (l *Ledger) Get(slot int) (Box, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.boxes[slot]
	return b, ok
}

// Set notes what a slot's sandbox is now.
func (l *Ledger) Set(slot int, b Box) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.boxes[slot] = b
}

// Drop empties a slot. Of a sandbox whose kill was acknowledged nothing may be found from then on.
func (l *Ledger) Drop(slot int, killed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if killed {
		l.dead[l.boxes[slot].ID] = struct{}{}
	}
	delete(l.boxes, slot)
}

// Excuse notes sandboxes that ran where the power failed.
func (l *Ledger) Excuse(ids ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		l.excused[id] = struct{}{}
	}
}

const (
	// early is how much before its time a sandbox may end: what clocks are apart by without anybody minding.
	early = 3 * time.Second
	// overdue is how long after its time one may be there yet: a node waits 15 s for the server that decides.
	overdue = 20 * time.Second
)

// mayEnd reports whether a sandbox may have ended by itself.
func (b *Box) mayEnd(now time.Time) bool { return !b.Ends.IsZero() && now.After(b.Ends.Add(-early)) }

// mustEnd reports whether it has to have.
func (b *Box) mustEnd(now time.Time) bool {
	return !b.Ends.IsZero() && now.After(b.EndsBy.Add(overdue))
}

// Promises is what a check compares with: a copy of the ledger.
type Promises struct {
	Now   time.Time
	Boxes map[int]Box
	Dead  map[string]struct{}
	Tags  map[string]struct{}
}

// Promises returns what has been acknowledged up to now.
func (l *Ledger) Promises() Promises {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := Promises{Now: time.Now(), Boxes: maps.Clone(l.boxes), Dead: maps.Clone(l.dead), Tags: maps.Clone(l.open)}
	for slot, b := range p.Boxes {
		_, b.Excused = l.excused[b.ID]
		p.Boxes[slot] = b
	}
	return p
}

// missing returns the acknowledged numbers that a sandbox's file lacks, and the lines that nobody wrote.
func (b *Box) missing(text string) (lost []int, strange []string) {
	have := map[int]bool{}
	for line := range strings.Lines(text) {
		n, err := strconv.Atoi(strings.TrimSuffix(line, "\n"))
		if err != nil || n < 1 || n > b.Tried || have[n] {
			strange = append(strange, line)
		}
		have[n] = true
	}
	for _, n := range b.Written {
		if !have[n] {
			lost = append(lost, n)
		}
	}
	return lost, slices.Clip(strange)
}
