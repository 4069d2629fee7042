package scheduler

import (
	"fmt"
	"math"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Refusal is why a node cannot take a request.
type Refusal uint8

// The refusals.
const (
	Accepted Refusal = iota
	// NotReady means that the node's state forbids new sandboxes.
	NotReady
	// NoEngine means that the node lacks the engine.
	NoEngine
	// NoLabel means that the node lacks a label.
	NoLabel
	// TooLarge means that the request exceeds the node's capacity even when it is empty.
	TooLarge
	// NoImage means that the node lacks what the sandbox is to start from.
	NoImage
	// NoRoom means that the request exceeds what is free.
	NoRoom
	// Busy means that too many creations are under way.
	Busy
	// Cordoned means that the administrator wants no new sandboxes there.
	Cordoned
	// Tainted means that the node has a taint that the request does not tolerate.
	Tainted
	// Broken means that the node failed too often lately.
	Broken
	// NoFit means that what was saved on another machine cannot go on there.
	NoFit
)

// Verdict is what was found about one node. It holds numbers, not text, so that a decision costs no formatting.
type Verdict struct {
	Node    sandbox.NodeID
	Refusal Refusal
	// Score and Load are set where Refusal is Accepted.
	Score float64
	Load  float64

	State     sandbox.NodeState
	Sandboxes int
	Creating  int
	Warm      int
	Want      sandbox.Resources
	Free      sandbox.Resources
	Limit     sandbox.Resources
	// Missing is the condition of the selector that is not met, where Refusal is NoLabel.
	Missing string
	// Taint is what is not tolerated, where Refusal is Tainted.
	Taint *sandbox.Taint
	// Machine and MadeOn are the node's and that of what was saved, where Refusal is NoFit.
	Machine *sandbox.Origin
	MadeOn  *sandbox.Origin
	// Failures is how many recent failures count, where they are too many.
	Failures float64
}

// Fits returns how many sandboxes of the wanted size there is room for.
func (v Verdict) Fits() int64 {
	n := int64(math.MaxInt64)
	for _, part := range [][2]int64{
		{v.Want.MilliCPU, v.Free.MilliCPU},
		{v.Want.MemoryBytes, v.Free.MemoryBytes},
		{v.Want.DiskBytes, v.Free.DiskBytes},
	} {
		if part[0] > 0 {
			n = min(n, max(0, part[1])/part[0])
		}
	}
	return n
}

// Reason explains the verdict as what can be said of the node, with its numbers.
func (v Verdict) Reason() string {
	switch v.Refusal {
	case Accepted:
		return v.accepted()
	case NotReady:
		return "is " + string(v.State)
	case NoEngine:
		return "lacks the engine"
	case NoLabel:
		return "does not meet the selector's " + v.Missing
	case TooLarge:
		return "is too small: " + shortOf(v.Want, v.Limit, v.Limit)
	case NoImage:
		return "does not have the template"
	case NoRoom:
		return "is full: " + shortOf(v.Want, v.Free, v.Limit)
	case Busy:
		return fmt.Sprintf("is busy: %d sandboxes being created", v.Creating)
	case Cordoned:
		return "is cordoned"
	case Tainted:
		return fmt.Sprintf("has the taint %s, which is not tolerated", v.Taint)
	case NoFit:
		return v.Machine.Refusal(v.MadeOn)
	case Broken:
		return fmt.Sprintf("failed too often lately: %.1f failures still count", v.Failures)
	}
	return fmt.Sprintf("refusal %d", v.Refusal)
}

func (v Verdict) accepted() string {
	text := fmt.Sprintf("scores %.3f: %.0f %% used with it, %d warm, %d being created", v.Score, v.Load*100, v.Warm, v.Creating)
	if v.Failures > 0 {
		text += fmt.Sprintf("; failed too often lately (%.1f), asked because there is no other", v.Failures)
	}
	return text
}

// String explains the verdict to a person.
func (v Verdict) String() string { return fmt.Sprintf("node %s %s", v.Node, v.Reason()) }

// Explain judges every node, where Place stops when its sample is full: the candidates first, best first. It is for a
// person who asks and costs as much as there are nodes.
func Explain(s Snapshot, r Request) Decision {
	s.Policy = s.Policy.WithDefaults()
	s.Policy.Sample, s.Policy.PrioritySelectNum = max(1, len(s.Nodes)), 1
	policy := rules{s.Policy}
	c := collector{policy: &policy, keep: len(s.Nodes)}
	for i := range s.Nodes {
		c.add(policy.judge(&s.Nodes[i], &r))
	}
	return c.decide(&r)
}

// Explain says in one line why nothing was found, or what was; it names no more nodes than most.
func (d Decision) Explain(most int) string {
	if len(d.Verdicts) == 0 {
		return "there is no node"
	}
	lines := make([]string, 0, most+1)
	for _, v := range d.Verdicts[:min(most, len(d.Verdicts))] {
		lines = append(lines, v.String())
	}
	if rest := len(d.Candidates) + d.Refused - len(lines); rest > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", rest))
	}
	return strings.Join(lines, "; ")
}

// shortOf names each part that is wanted beyond what is free.
func shortOf(want, free, limit sandbox.Resources) string {
	var parts []string
	if want.MilliCPU > free.MilliCPU {
		parts = append(parts, fmt.Sprintf("wants %d millicores, %d of %d free", want.MilliCPU, max(0, free.MilliCPU), limit.MilliCPU))
	}
	if want.MemoryBytes > free.MemoryBytes {
		parts = append(parts, fmt.Sprintf("wants %d MiB of memory, %d of %d free", mib(want.MemoryBytes), mib(free.MemoryBytes), mib(limit.MemoryBytes)))
	}
	if want.DiskBytes > free.DiskBytes {
		parts = append(parts, fmt.Sprintf("wants %d MiB of disk, %d of %d free", mib(want.DiskBytes), mib(free.DiskBytes), mib(limit.DiskBytes)))
	}
	return strings.Join(parts, ", ")
}

func mib(bytes int64) int64 { return max(0, bytes) >> 20 }
