// Package chaos breaks a running cluster on purpose, while it is used, and looks at what has become of what it promised.
//
// A run has three parts that know nothing of each other: the plan (plan.go) says what is done when and is a pure function of
// a seed; the ledger (ledger.go) notes what the cluster has acknowledged; the check (check.go) is a pure function that
// compares the ledger with what is found on the machines. The rest carries that out. docs/reliability.md says what it is for.
package chaos

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
)

// Kind is what a fault does. Each is undone when it ends.
type Kind string

// The kinds of faults.
const (
	// Kill ends the daemon with SIGKILL; what it runs goes on. At the end it is started again.
	Kill Kind = "kill"
	// Power ends everything in the machine at once, sandboxes too.
	Power Kind = "power"
	// Halt stops the daemon with SIGSTOP, Freeze everything in the machine.
	Halt   Kind = "halt"
	Freeze Kind = "freeze"
	// Isolate cuts the machine off from all others, Cut from Peer. Deaf drops what Peer sends to the machine.
	Isolate Kind = "isolate"
	Cut     Kind = "cut"
	Deaf    Kind = "deaf"
	// Fill leaves no free byte on the machine's disk.
	Fill Kind = "fill"
	// Drain has the node give its sandboxes to others; it is no fault, but comes at times like one.
	Drain Kind = "drain"
	// Clock sets the wall clock of the machine's daemon by Step, and at the end back. It comes whatever else the machine has.
	Clock Kind = "clock"
)

// Fault is one thing that goes wrong, At after the begin of its round and For so long.
type Fault struct {
	At     time.Duration `json:"at"`
	For    time.Duration `json:"for"`
	Kind   Kind          `json:"kind"`
	Target string        `json:"target"`
	Peer   string        `json:"peer,omitempty"`
	Step   time.Duration `json:"step,omitempty"`
}

// Verb is what is done with the sandbox of a slot. A slot that has none gets one instead.
type Verb string

// The verbs.
const (
	// Write has a command append a number to a file, Read reads the file.
	Write Verb = "write"
	Read  Verb = "read"
	// Toggle pauses a sandbox that runs, and resumes one that is paused.
	Toggle Verb = "toggle"
	End    Verb = "kill"
	// Look asks the server for a sandbox of a brief life.
	Look Verb = "look"
	// Create is what is done to an empty slot, Rest what is done to a paused sandbox instead of using it: nothing. They are in
	// no plan.
	Create Verb = "create"
	Rest   Verb = "rest"
)

// Operation is one thing that a client does, At after the begin of its round. Those of a slot are done one after the other.
type Operation struct {
	At   time.Duration `json:"at"`
	Slot int           `json:"slot"`
	Verb Verb          `json:"verb"`
}

// Round is a time of faults and load. After it everything is healed and checked.
type Round struct {
	Faults []Fault
	// Load holds the operations of each slot in order of time.
	Load [][]Operation
}

// Setup is what a plan is for.
type Setup struct {
	// Total is for how long things go wrong, in rounds of ActiveTime.
	Total time.Duration
	Nodes int
	Slots int
	// Clock has clocks set, too. The rest of the plan is the same without.
	Clock bool
}

const (
	// ActiveTime is for how long things go wrong in a round; healing comes on top.
	ActiveTime = 20 * time.Second
	// lanes is how many faults there may be at once, beside drains and clocks.
	lanes = 2
	// Every so many slots there is one whose sandboxes have a brief life.
	briefEvery = 6
)

// card is a kind of fault at a kind of machine; of one that says peer, the other end is another machine.
type card struct {
	kind         Kind
	target, peer string
}

func deck() []card {
	return []card{
		{Kill, "node", ""},
		{Kill, "node", ""},
		{Kill, "server", ""},
		{Kill, "proxy", ""},
		{Power, "node", ""},
		{Halt, "node", ""},
		{Halt, "server", ""},
		{Freeze, "node", ""},
		{Isolate, "node", ""},
		{Isolate, "server", ""},
		{Cut, "node", "server"},
		{Cut, "node", "node"},
		{Cut, "node", "proxy"},
		{Deaf, "node", "server"},
		{Deaf, "server", "node"},
		{Fill, "node", ""},
		{Fill, "server", ""},
	}
}

// planner deals faults: all of the deck before one comes again.
type planner struct {
	rng, clockRNG *rand.Rand
	setup         Setup
	rest          []card
	// clocks are the roles of machines whose clocks are to be set next.
	clocks []string
	// busy says until when a machine has a fault.
	busy map[string]time.Duration
}

// Make returns the plan of a seed. The same seed and set-up give the same plan.
func Make(seed uint64, s Setup) []Round {
	p := &planner{rng: rand.New(rand.NewPCG(seed, 0)), clockRNG: rand.New(rand.NewPCG(seed, 1)), setup: s} //nolint:gosec // it is to be repeatable
	rounds := make([]Round, max(1, int(s.Total/ActiveTime)))
	for i := range rounds {
		rounds[i] = Round{Faults: p.faults(), Load: p.load()}
		if s.Clock {
			rounds[i].Faults = inOrder(append(rounds[i].Faults, p.steps()...))
		}
	}
	return rounds
}

// between returns a time from a up to b.
func (p *planner) between(a, b time.Duration) time.Duration { return between(p.rng, a, b) }

func between(rng *rand.Rand, a, b time.Duration) time.Duration {
	return a + time.Duration(rng.Int64N(int64(b-a)/int64(time.Millisecond)))*time.Millisecond
}

func inOrder(faults []Fault) []Fault {
	slices.SortStableFunc(faults, func(a, b Fault) int { return cmp.Compare(a.At, b.At) })
	return faults
}

// steps sets clocks, one at a time: mostly by up to a minute, sometimes by hours.
func (p *planner) steps() []Fault {
	var out []Fault
	rng := p.clockRNG
	for at := between(rng, 300*time.Millisecond, 4*time.Second); ; {
		f := Fault{At: at, For: between(rng, time.Second, 10*time.Second), Kind: Clock}
		if f.At+f.For > ActiveTime {
			return out
		}
		if len(p.clocks) == 0 {
			p.clocks = []string{"node", "node", "server", "server", "proxy"}
			rng.Shuffle(len(p.clocks), func(i, j int) { p.clocks[i], p.clocks[j] = p.clocks[j], p.clocks[i] })
		}
		f.Target = machineOf(rng, p.clocks[0], p.setup.Nodes)
		p.clocks = p.clocks[1:]
		f.Step = between(rng, 5*time.Second, time.Minute)
		if rng.IntN(4) == 0 {
			f.Step = between(rng, time.Hour, 6*time.Hour)
		}
		f.Step = f.Step.Truncate(time.Second) * time.Duration(1-2*rng.IntN(2))
		out = append(out, f)
		at = f.At + f.For + between(rng, 200*time.Millisecond, 2*time.Second)
	}
}

// length is how long a fault lasts: some outlast the time after which a node is down.
func (p *planner) length() time.Duration {
	if p.rng.IntN(3) == 0 {
		return p.between(6*time.Second, 10*time.Second)
	}
	return p.between(300*time.Millisecond, 4*time.Second)
}

func (p *planner) faults() []Fault {
	p.busy = make(map[string]time.Duration)
	var out []Fault
	free := make([]time.Duration, lanes)
	for {
		lane := slices.Index(free, slices.Min(free))
		f := p.deal(free[lane]+p.between(200*time.Millisecond, 1500*time.Millisecond), p.length())
		if f.At+f.For > ActiveTime {
			break
		}
		free[lane] = f.At + f.For
		out = append(out, f)
	}
	for at := p.between(time.Second, 6*time.Second); at < ActiveTime-6*time.Second; at += p.between(7*time.Second, 14*time.Second) {
		out = append(out, Fault{At: at, For: p.between(2*time.Second, 6*time.Second), Kind: Drain, Target: p.machine("node", "")})
	}
	return inOrder(out)
}

// deal takes the next card whose machines have no other fault at the time.
func (p *planner) deal(at, length time.Duration) Fault {
	for {
		if len(p.rest) == 0 {
			p.rest = deck()
			p.rng.Shuffle(len(p.rest), func(i, j int) { p.rest[i], p.rest[j] = p.rest[j], p.rest[i] })
		}
		for i, c := range p.rest {
			f := Fault{At: at, For: length, Kind: c.kind, Target: p.machine(c.target, "")}
			if c.peer != "" {
				f.Peer = p.machine(c.peer, f.Target)
			}
			if p.busy[f.Target] > at || p.busy[f.Peer] > at {
				continue
			}
			p.busy[f.Target] = at + length
			if f.Peer != "" {
				p.busy[f.Peer] = at + length
			}
			p.rest = slices.Delete(p.rest, i, i+1)
			return f
		}
		p.rest = nil // nothing of it fits now
		at += 100 * time.Millisecond
	}
}

// machine returns the name of a machine of a role that is not the other.
func (p *planner) machine(role, other string) string {
	for {
		if name := machineOf(p.rng, role, p.setup.Nodes); name != other {
			return name
		}
	}
}

func machineOf(rng *rand.Rand, role string, nodes int) string {
	switch role {
	case "server":
		return role
	case "proxy":
		return "proxy1"
	}
	return nodeName(rng.IntN(nodes))
}

func nodeName(i int) string { return "node" + strconv.Itoa(i+1) }

func (p *planner) load() [][]Operation {
	out := make([][]Operation, p.setup.Slots)
	for slot := range out {
		for at := p.between(0, time.Second); at < ActiveTime; at += p.between(200*time.Millisecond, 1600*time.Millisecond) {
			out[slot] = append(out[slot], Operation{At: at, Slot: slot, Verb: p.verb(slot)})
		}
	}
	return out
}

// brief reports whether the sandboxes of a slot have a brief life, whose end is looked for.
func brief(slot int) bool { return slot%briefEvery == briefEvery-1 }

// pauses reports whether those of a brief life are paused at their end.
func pauses(slot int) bool { return slot%(2*briefEvery) == 2*briefEvery-1 }

// verb draws what is done next. Every second slot is in no hurry: what is paused there is paused for long.
func (p *planner) verb(slot int) Verb {
	toggle, end := 33, 12
	if slot%2 == 1 {
		toggle, end = 14, 4
	}
	switch n := p.rng.IntN(100); {
	case brief(slot):
		return Look
	case n < end:
		return End
	case n < end+toggle:
		return Toggle
	case n%3 == 0:
		return Read
	}
	return Write
}
