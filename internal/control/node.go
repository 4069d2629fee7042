package control

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// ListNodes returns all nodes that ever registered, in order of name.
func (c *Control) ListNodes(context.Context) ([]Node, error) {
	all := c.fleet.list(time.Now())
	for i := range all {
		n := &all[i]
		n.Drain = c.drains.progress(n.ID, n.Settings.Drain)
		if d := n.Drain; d != nil && d.DoneAt.IsZero() && d.Moved+d.Ended+d.Left == 0 { // it has only just begun
			d.Left = len(c.index.at(n.ID, func(e *entry) bool { return !e.box.State.Ended() }))
		}
	}
	return all, nil
}

// GetNode returns a node by id or, where only one has it, by name.
func (c *Control) GetNode(ctx context.Context, idOrName string) (Node, error) {
	var named []Node
	all, err := c.ListNodes(ctx)
	if err != nil {
		return Node{}, err
	}
	for _, n := range all {
		if string(n.ID) == idOrName {
			return n, nil
		}
		if n.Name == idOrName {
			named = append(named, n)
		}
	}
	switch len(named) {
	case 0:
		return Node{}, sandbox.NotFoundf("node %.80q does not exist", idOrName)
	case 1:
		return named[0], nil
	}
	return Node{}, sandbox.Invalidf("%d nodes are named %q: use the id of one", len(named), idOrName)
}

// NodeChange is what an administrator changes about a node. The zero value changes nothing.
type NodeChange struct {
	// Labels sets labels; nil takes one away.
	Labels map[string]*string
	// AddTaints sets taints, in place of those with the same key and effect; RemoveTaints takes them away by key and, unless
	// it is empty, effect.
	AddTaints    []sandbox.Taint
	RemoveTaints []sandbox.Taint
	// Cordoned says whether the node gets new sandboxes; nil leaves that as it is. Reason says why.
	Cordoned *bool
	Reason   string
}

// maxReason bounds why a node is cordoned, in bytes.
const maxReason = 256

// UpdateNode changes what the administrator wants of a node, all of it or nothing, and has the scheduler heed it at once.
// Errors: ErrNotFound, ErrInvalid, ErrConflict for the removal of a label or taint that was not set.
func (c *Control) UpdateNode(ctx context.Context, idOrName string, change NodeChange) (Node, error) {
	if err := change.check(); err != nil {
		return Node{}, err
	}
	n, err := c.GetNode(ctx, idOrName)
	if err != nil {
		return Node{}, err
	}
	now := time.Now().UTC()
	settings, err := c.settings.UpdateNodeSettings(ctx, n.ID, func(s *sandbox.NodeSettings) error { return change.apply(s, now) })
	if err != nil {
		return Node{}, fmt.Errorf("change node %s: %w", n.Name, err)
	}
	c.fleet.set(n.ID, settings)
	for _, e := range change.events(n, settings) {
		c.log.LogAttrs(ctx, slog.LevelInfo, "node settings changed", nodeAttr(n.ID), slog.String("what", e.Type), slog.String("to", e.Message))
		c.note(ctx, e)
	}
	return c.GetNode(ctx, string(n.ID))
}

func (h *NodeChange) check() error {
	for key, value := range h.Labels {
		if err := sandbox.CheckLabelKey(key); err != nil {
			return fmt.Errorf("label: %w", err)
		}
		if strings.HasPrefix(key, sandbox.OwnLabels) {
			return sandbox.Invalidf("label %s: keys that begin with %s are Cloister's own; choose another", key, sandbox.OwnLabels)
		}
		if value == nil {
			continue
		}
		if err := sandbox.CheckLabelValue(*value); err != nil {
			return fmt.Errorf("label %s: %w", key, err)
		}
	}
	for _, t := range h.AddTaints {
		if err := t.Check(); err != nil {
			return fmt.Errorf("taint: %w", err)
		}
	}
	for _, t := range h.RemoveTaints {
		if t.Effect != "" && !t.Effect.Valid() {
			return sandbox.Invalidf("taint: %v", t.Check())
		}
		if err := sandbox.CheckLabelKey(t.Key); err != nil {
			return fmt.Errorf("taint: %w", err)
		}
	}
	if len(h.Reason) > maxReason {
		return sandbox.Invalidf("reason of %d bytes: want at most %d", len(h.Reason), maxReason)
	}
	return nil
}

func (h *NodeChange) apply(s *sandbox.NodeSettings, now time.Time) error {
	for key, value := range h.Labels {
		if s.Labels == nil {
			s.Labels = make(map[string]string)
		}
		if value != nil {
			s.Labels[key] = *value
			continue
		}
		if _, ok := s.Labels[key]; !ok {
			return sandbox.Conflictf("label %s was not set here: only labels that an administrator set can be removed", key)
		}
		delete(s.Labels, key)
	}
	for _, t := range h.RemoveTaints {
		if !s.RemoveTaint(t.Key, t.Effect) {
			return sandbox.Conflictf("taint %s is not on the node", strings.TrimSuffix(sandbox.Taint{Key: t.Key, Effect: t.Effect}.String(), ":"))
		}
	}
	for _, t := range h.AddTaints {
		s.AddTaint(t)
	}
	if len(s.Labels) > sandbox.MaxNodeLabels || len(s.Taints) > sandbox.MaxNodeTaints {
		return sandbox.Invalidf("%d labels and %d taints: want at most %d and %d", len(s.Labels), len(s.Taints),
			sandbox.MaxNodeLabels, sandbox.MaxNodeTaints)
	}
	h.cordon(s, now)
	return nil
}

func (h *NodeChange) cordon(s *sandbox.NodeSettings, now time.Time) {
	switch {
	case h.Cordoned == nil:
	case !*h.Cordoned:
		if s.Cordoned {
			s.CordonedAt = now
		}
		s.Cordoned, s.Reason, s.Drain = false, "", nil
	case s.Cordoned:
		if h.Reason != "" {
			s.Reason = h.Reason
		}
	default:
		s.Cordoned, s.Reason, s.CordonedAt = true, h.Reason, now
	}
}

// events tells what was changed; a node that was cordoned already is not told of again.
func (h *NodeChange) events(before Node, after sandbox.NodeSettings) []Event {
	var out []Event
	tell := func(kind, message string) {
		out = append(out, Event{Type: kind, NodeID: before.ID, Message: fmt.Sprintf("node %s %s", before.Name, message)})
	}
	if len(h.Labels) > 0 {
		tell("node_labelled", "has the labels "+pairText(after.Labels))
	}
	if len(h.AddTaints)+len(h.RemoveTaints) > 0 {
		tell("node_tainted", "has the taints "+taintText(after.Taints))
	}
	switch {
	case before.Settings.Cordoned == after.Cordoned:
	case after.Cordoned && after.Reason != "":
		tell("node_cordoned", "gets no new sandboxes: "+after.Reason)
	case after.Cordoned:
		tell("node_cordoned", "gets no new sandboxes")
	default:
		tell("node_uncordoned", "gets new sandboxes again")
	}
	return out
}

func pairText(labels map[string]string) string {
	out := make([]string, 0, len(labels))
	for k, v := range labels {
		out = append(out, k+"="+v)
	}
	return listText(out)
}

func taintText(taints []sandbox.Taint) string {
	out := make([]string, 0, len(taints))
	for _, t := range taints {
		out = append(out, t.String())
	}
	return listText(out)
}

func listText(all []string) string {
	if len(all) == 0 {
		return "(none)"
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}
