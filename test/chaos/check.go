package chaos

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// staleAfter is how old a checkpoint is that nothing names any more: replicas without a record are kept for a minute, which
	// each server counts anew.
	staleAfter = 150 * time.Second
	// What a transfer that broke off has left is kept for an hour, so that the next one goes on from there.
	partialPrefix = ".partial-"
	partialAfter  = time.Hour + time.Minute
)

// View is what is found on the machines at one time.
type View struct {
	// Sandboxes are all that the server knows, ended ones too, by id.
	Sandboxes map[string]client.Sandbox
	Nodes     []client.Node
	Machines  []MachineView
	// Up is for how long the server has been running.
	Up time.Duration
	// Routed says of sandboxes that were killed whether the proxy still knows them.
	Routed map[string]bool
}

// MachineView is what is found on one node's machine.
type MachineView struct {
	Name     string
	NodeID   string
	Capacity sandbox.Resources
	Records  []journal.Record
	// Sentries are the processes of each sandbox.
	Sentries map[string][]int
	// Groups are the sandboxes that have a control group.
	Groups []string
	// Links is how many network links for sandboxes there are, Spare how many the node keeps ready.
	Links, Spare int
	// Checkpoints are their ages by name.
	Checkpoints map[string]time.Duration
}

// Violation is a promise that was not kept.
type Violation struct {
	Rule string `json:"rule"`
	// ID is the sandbox that it is about, Machine the machine, where it is about one.
	ID      string `json:"id,omitempty"`
	Machine string `json:"machine,omitempty"`
	Text    string `json:"text"`
}

// Check says which promises are not kept on machines that are at rest.
func Check(p Promises, v *View) []Violation {
	c := &check{promises: p, view: v}
	for _, n := range v.Nodes {
		if n.State != "ready" {
			c.fail("stuck", "", n.Name, "the node is %s", n.State)
		}
	}
	for _, slot := range slices.Sorted(maps.Keys(p.Boxes)) {
		c.box(p.Boxes[slot])
	}
	for i := range v.Machines {
		c.machine(&v.Machines[i])
	}
	c.server()
	return c.found
}

type check struct {
	promises Promises
	view     *View
	found    []Violation
}

func (c *check) fail(rule, id, machine, format string, args ...any) {
	c.found = append(c.found, Violation{Rule: rule, ID: id, Machine: machine, Text: fmt.Sprintf(format, args...)})
}

// box looks for a sandbox that was acknowledged.
func (c *check) box(b Box) {
	s, known := c.view.Sandboxes[b.ID]
	ended := !known || sandbox.State(s.State).Ended()
	if b.Pauses && s.State == "paused" && b.mayEnd(c.promises.Now) {
		return
	}
	switch {
	case ended && (b.Belief == Doomed || b.mayEnd(c.promises.Now)):
	case b.mustEnd(c.promises.Now):
		c.fail("late", b.ID, "", "the sandbox is %s, and was to end at %s", s.State, b.EndsBy)
	case !known:
		c.fail("lost", b.ID, "", "the server does not know the sandbox, which was acknowledged as %s", b.Belief)
	case ended && b.Excused:
		if s.State == "lost" && s.EndedAt.IsZero() {
			c.fail("lost", b.ID, "", "the sandbox is lost without a time")
		}
	case ended:
		c.fail("lost", b.ID, "", "the sandbox, which was acknowledged as %s, is %s: %s", b.Belief, s.State, s.Reason)
	case b.Belief == Running && s.State != "running" || b.Belief == Paused && s.State != "paused":
		c.fail("lost", b.ID, "", "the sandbox was acknowledged as %s and is %s: %s", b.Belief, s.State, s.Reason)
	}
}

// server compares what the server knows with the nodes.
func (c *check) server() {
	homes := map[string][]string{}
	for i := range c.view.Machines {
		m := &c.view.Machines[i]
		for k := range m.Records {
			if r := &m.Records[k]; !r.State.Ended() && !r.Warm {
				homes[string(r.ID)] = append(homes[string(r.ID)], m.Name)
				c.compare(m, r)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.view.Sandboxes)) {
		s := c.view.Sandboxes[id]
		if sandbox.State(s.State).Ended() {
			continue
		}
		if _, ok := c.promises.Tags[s.Metadata[tagKey]]; !ok {
			c.fail("orphan", id, "", "nobody asked for this sandbox")
		}
		if n := len(homes[id]); n != 1 {
			c.fail("twice", id, "", "the server says %s, and %d nodes have it: %v", s.State, n, homes[id])
		}
	}
	for id := range c.promises.Dead {
		if s, ok := c.view.Sandboxes[id]; ok && !sandbox.State(s.State).Ended() {
			c.fail("orphan", id, "", "the sandbox was killed and is %s", s.State)
		}
		if c.view.Routed[id] {
			c.fail("orphan", id, "", "the sandbox was killed and the proxy still knows it")
		}
	}
}

// compare compares a node's record of a sandbox with the server's.
func (c *check) compare(m *MachineView, r *journal.Record) {
	id := string(r.ID)
	if r.BuildID != "" {
		return
	}
	s, known := c.view.Sandboxes[id]
	switch {
	case !known || sandbox.State(s.State).Ended():
		c.fail("orphan", id, m.Name, "the node has the sandbox as %s, the server as %q", r.State, s.State)
	case s.State != string(r.State) || s.NodeID != m.NodeID:
		c.fail("stuck", id, m.Name, "the node says %s, the server says %s at node %s", r.State, s.State, s.NodeID)
	case r.State != sandbox.StateRunning && r.State != sandbox.StatePaused:
		c.fail("stuck", id, m.Name, "the sandbox is %s since %s, its deadline is %s", r.State, r.Last.Time, r.Deadline)
	}
}

// machine looks for what belongs to no sandbox, and for more than the machine has.
func (c *check) machine(m *MachineView) {
	live := map[string]bool{}
	named := map[string]bool{}
	for i := range m.Records {
		r := &m.Records[i]
		named[r.Checkpoint], named[r.Source] = true, true
		live[string(r.ID)] = !r.State.Ended() && r.State != sandbox.StatePaused
		if n := len(m.Sentries[string(r.ID)]); r.State == sandbox.StateRunning && n != 1 {
			c.fail("lost", string(r.ID), m.Name, "the sandbox is running in %d processes", n)
		}
	}
	for id, pids := range m.Sentries {
		if !live[id] {
			c.fail("orphan", id, m.Name, "processes %v of a sandbox that does not run here", pids)
		}
	}
	for _, id := range m.Groups {
		if !live[id] {
			c.fail("orphan", id, m.Name, "a control group of a sandbox that does not run here")
		}
	}
	running := 0
	for _, ok := range live {
		if ok {
			running++
		}
	}
	if m.Links > running+m.Spare {
		c.fail("orphan", "", m.Name, "%d network links for %d sandboxes and %d spare ones", m.Links, running, m.Spare)
	}
	c.checkpoints(m, named)
	c.found = append(c.found, Overcommit(m)...)
}

// checkpoints looks for those that nothing names.
func (c *check) checkpoints(m *MachineView, named map[string]bool) {
	for name, age := range m.Checkpoints {
		most := staleAfter
		if strings.HasPrefix(name, partialPrefix) {
			most = partialAfter
		}
		if !named[name] && min(age, c.view.Up) > most && !c.replicated(name) {
			c.fail("orphan", "", m.Name, "checkpoint %s, %s old, of no sandbox", name, age.Round(time.Second))
		}
	}
}

// replicated reports whether a checkpoint is that of a paused sandbox of any node.
func (c *check) replicated(name string) bool {
	for i := range c.view.Machines {
		for k := range c.view.Machines[i].Records {
			if r := &c.view.Machines[i].Records[k]; r.Checkpoint == name && !r.State.Ended() {
				return true
			}
		}
	}
	return false
}

// Overcommit says whether a node has admitted more than it has. It holds at any time.
func Overcommit(m *MachineView) []Violation {
	var sum sandbox.Resources
	for i := range m.Records {
		sum = sum.Add(m.Records[i].Held())
	}
	if sum.MemoryBytes <= m.Capacity.MemoryBytes && sum.MilliCPU <= m.Capacity.MilliCPU {
		return nil
	}
	var who []string
	for i := range m.Records {
		r := &m.Records[i]
		if held := r.Held(); held.MemoryBytes > 0 {
			who = append(who, fmt.Sprintf("%s %s %d MiB, warm %t, %s at %s", r.ID, r.State, held.MemoryBytes>>20, r.Warm, r.Last.Type, r.Last.Time.Format(time.RFC3339Nano)))
		}
	}
	return []Violation{{Rule: "overcommit", Machine: m.Name, Text: fmt.Sprintf("%+v admitted, of %+v: %s", sum, m.Capacity, strings.Join(who, "; "))}}
}

// Standing leaves out of a machine's processes those that are one alone for a sandbox that does not run there by its record: it
// moves, or is being cleared away.
func Standing(sentries map[string][]int, records []journal.Record) {
	runs := make(map[string]bool, len(records))
	for i := range records {
		switch records[i].State { //nolint:exhaustive // in all others it stands still, or nobody can use it
		case sandbox.StateRunning, sandbox.StatePausing, sandbox.StateResuming:
			runs[string(records[i].ID)] = true
		default:
		}
	}
	maps.DeleteFunc(sentries, func(id string, pids []int) bool { return len(pids) == 1 && !runs[id] })
}

// Twice says which sandboxes have processes on more than one machine, or more than one on one.
func Twice(sentries map[string]map[string][]int) []Violation {
	where := map[string][]string{}
	for machine, all := range sentries {
		for id, pids := range all {
			for range pids {
				where[id] = append(where[id], machine)
			}
		}
	}
	var out []Violation
	for _, id := range slices.Sorted(maps.Keys(where)) {
		if at := where[id]; len(at) > 1 {
			slices.Sort(at)
			out = append(out, Violation{Rule: "twice", ID: id, Text: fmt.Sprintf("processes of the sandbox on %v", at)})
		}
	}
	return out
}
