package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// RemoveNode takes a node out of the cluster for good. Its paused sandboxes are brought back from their replicas first; what
// else it had is gone with it.
// Errors: ErrNotFound; ErrConflict for a node that has sandboxes and answers, unless force is set.
func (c *Control) RemoveNode(ctx context.Context, idOrName string, force bool) error {
	n, err := c.GetNode(ctx, idOrName)
	if err != nil {
		return err
	}
	down := c.fleet.isDown(n.ID)
	here := c.index.at(n.ID, func(e *entry) bool { return !e.box.State.Ended() })
	if len(here) > 0 && !down && !force {
		return sandbox.Conflictf("node %s has %d sandboxes: `cloister node drain %s` moves them, force ends them", n.Name, len(here), n.Name)
	}
	if !down {
		if err := c.killAll(ctx, n, here); err != nil {
			return err
		}
	} else if err := c.recoverAll(ctx, n.ID); err != nil {
		if !force {
			return fmt.Errorf("remove node %s: %w; force gives them up", n.Name, err)
		}
		c.log.LogAttrs(ctx, slog.LevelWarn, "paused sandboxes given up", nodeAttr(n.ID), errAttr(err))
	}
	if err := c.unrecordNode(ctx, n.ID); err != nil {
		return fmt.Errorf("remove node %s: %w", n.Name, err)
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "node removed", nodeAttr(n.ID), slog.Int("sandboxes", len(here)), slog.Bool("force", force))
	c.note(ctx, Event{Type: "node_removed", NodeID: n.ID, Message: fmt.Sprintf("node %s removed", n.Name)})
	return nil
}

// killAll ends what a node that answers has.
func (c *Control) killAll(ctx context.Context, n Node, ids []sandbox.ID) error {
	for _, id := range ids {
		if err := c.Kill(ctx, id); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return fmt.Errorf("remove node %s: %w", n.Name, err)
		}
	}
	return nil
}

// recoverAll brings back the paused sandboxes of a node that does not answer. It returns an error where one has a replica and
// cannot be brought back now.
func (c *Control) recoverAll(ctx context.Context, node sandbox.NodeID) error {
	view, err := c.copyView(ctx, time.Now())
	if err != nil {
		return err
	}
	plan := copyPlan{copyView: view}
	for i := range view.nodes {
		view.nodes[i].givenUp = view.nodes[i].givenUp || view.nodes[i].id == node
	}
	view.skip = func(string) bool { return false }
	for _, r := range view.records {
		if r.Home != node {
			continue
		}
		to := plan.newHome(r)
		if to == nil {
			return sandbox.Unavailablef("sandbox %s has replicas and no node to be brought back on", r.ID)
		}
		if err := c.recoverBox(ctx, r, to.id); err != nil {
			return err
		}
	}
	return nil
}

// unrecordNode removes what is recorded of a node: its membership first, so that it cannot come back half-way.
func (c *Control) unrecordNode(ctx context.Context, id sandbox.NodeID) error {
	if err := c.expel(ctx, sandbox.Member{Role: sandbox.RoleNode, ID: string(id)}); err != nil {
		return err
	}
	if err := c.nodes.DeleteNode(ctx, id); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	if err := c.settings.DeleteNodeSettings(ctx, id); err != nil {
		return err
	}
	c.fleet.remove(id)
	c.copies.forget(id)
	for _, box := range c.index.at(id, func(*entry) bool { return true }) {
		c.buried(box, "its node was removed from the cluster")
		c.strays.ended(box)
	}
	for _, k := range c.noted.allKills() {
		if k.Node == id {
			if err := c.intents.DeleteKillIntent(ctx, k.ID); err != nil {
				return err
			}
			c.noted.setKill(k.ID, nil)
		}
	}
	for _, p := range c.noted.allPlacements() {
		if err := c.dropStale(ctx, p.ID, id); err != nil {
			return err
		}
	}
	return nil
}
