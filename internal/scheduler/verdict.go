package scheduler

import (
	"fmt"
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
)

// Verdict is what was found about one node. It holds numbers, not text, so that a decision costs no formatting.
type Verdict struct {
	Node    sandbox.NodeID
	Refusal Refusal
	// Score and Load are set where Refusal is Accepted.
	Score float64
	Load  float64

	State    sandbox.NodeState
	Creating int
	Warm     int
	Want     sandbox.Resources
	Free     sandbox.Resources
	Limit    sandbox.Resources
}

// String explains the verdict to a person, with its numbers.
func (v Verdict) String() string {
	switch v.Refusal {
	case Accepted:
		return fmt.Sprintf("node %s scores %.3f: %.0f %% used with it, %d warm, %d being created",
			v.Node, v.Score, v.Load*100, v.Warm, v.Creating)
	case NotReady:
		return fmt.Sprintf("node %s is %s", v.Node, v.State)
	case NoEngine:
		return fmt.Sprintf("node %s lacks the engine", v.Node)
	case NoLabel:
		return fmt.Sprintf("node %s lacks a wanted label", v.Node)
	case TooLarge:
		return fmt.Sprintf("node %s is too small: %s", v.Node, shortOf(v.Want, v.Limit, v.Limit))
	case NoImage:
		return fmt.Sprintf("node %s does not have the template", v.Node)
	case NoRoom:
		return fmt.Sprintf("node %s is full: %s", v.Node, shortOf(v.Want, v.Free, v.Limit))
	case Busy:
		return fmt.Sprintf("node %s is busy: %d sandboxes being created", v.Node, v.Creating)
	}
	return fmt.Sprintf("node %s: refusal %d", v.Node, v.Refusal)
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
