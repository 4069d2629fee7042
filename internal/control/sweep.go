package control

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"strings"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxSweeps bounds the registrations whose checkpoints wait to be looked through; those beyond it are not, until their
// nodes register again.
const maxSweeps = 64

// roll is what a node said at its registration that it keeps.
type roll struct {
	node        sandbox.NodeID
	checkpoints []string
}

// offerSweep has Run look through the checkpoints that a node registered with.
func (c *Control) offerSweep(node sandbox.NodeID, checkpoints []string) {
	if len(checkpoints) == 0 {
		return
	}
	select {
	case c.sweeps <- roll{node: node, checkpoints: checkpoints}:
	default:
	}
}

// runSweeps removes from nodes what a server that crashed has left there: checkpoints that are in no record, and those
// that forks started from.
func (c *Control) runSweeps(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-c.sweeps:
			if err := c.sweep(ctx, r); err != nil {
				c.log.LogAttrs(ctx, slog.LevelWarn, "checkpoints not looked through", nodeAttr(r.node), errAttr(err))
			}
		}
	}
}

// sweep looks at what is being saved before it reads the records: what is in neither was given up.
func (c *Control) sweep(ctx context.Context, r roll) error {
	left := left(r.checkpoints, c.saving.has)
	if len(left) == 0 {
		return nil
	}
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return fmt.Errorf("read the templates: %w", err)
	}
	for _, t := range all {
		for _, b := range t.Builds {
			delete(left, b.ID)
		}
	}
	for _, kept := range c.noted.allReplicas() {
		delete(left, kept.Checkpoint)
	}
	agent, err := c.agent(r.node)
	if err != nil {
		return err
	}
	for id := range left {
		if err := c.sweepOne(ctx, held{box: sandbox.Sandbox{NodeID: r.node}, agent: agent}, id); err != nil {
			return err
		}
	}
	return nil
}

func (c *Control) sweepOne(ctx context.Context, h held, id string) error {
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	_, err := h.agent.RemoveCheckpoint(ctx, &agentv1.RemoveCheckpointRequest{CheckpointId: id})
	if err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", id, fromNode(h.box.NodeID, err))
	}
	c.fleet.setImage(h.box.NodeID, id, false)
	c.log.LogAttrs(ctx, slog.LevelInfo, "forgotten checkpoint removed", nodeAttr(h.box.NodeID), slog.String("checkpoint_id", id))
	return nil
}

// buildIDForm is that of newBuildID.
var buildIDForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// left returns the checkpoints whose names a server made and that are not being made now. Others are the node's own.
func left(checkpoints []string, busy func(string) bool) map[string]struct{} {
	out := make(map[string]struct{})
	for _, id := range checkpoints {
		if buildIDForm.MatchString(strings.TrimPrefix(id, forkPrefix)) && !busy(id) {
			out[id] = struct{}{}
		}
	}
	return out
}
