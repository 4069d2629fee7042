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
	if errors.Is(err, sandbox.ErrNotFound) {
		return c.removeUnseen(ctx, idOrName, err)
	}
	if err != nil {
		return err
	}
	return c.takeOut(ctx, n, force, c.fleet.isDown(n.ID))
}

// removeUnseen takes out a node that joined and never ran; where there is none it returns unknown.
func (c *Control) removeUnseen(ctx context.Context, idOrName string, unknown error) error {
	all, err := c.ListMembers(ctx)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.Role == sandbox.RoleNode && (m.ID == idOrName || m.Name == idOrName) {
			return c.expel(ctx, m.Member)
		}
	}
	return unknown
}

// takeOut removes a node; away means that it cannot be asked for anything.
func (c *Control) takeOut(ctx context.Context, n Node, force, away bool) error {
	here := c.index.at(n.ID, func(e *entry) bool { return !e.box.State.Ended() })
	if len(here) > 0 && !away && !force {
		return sandbox.Conflictf("node %s has %d sandboxes: `cloister node drain %s` moves them, --force ends them", n.Name, len(here), n.Name)
	}
	if err := c.recoverAll(ctx, n.ID); err != nil {
		if !force {
			return fmt.Errorf("remove node %s: %w; force gives them up", n.Name, err)
		}
		c.log.LogAttrs(ctx, slog.LevelWarn, "paused sandboxes given up", nodeAttr(n.ID), errAttr(err))
	}
	if !away {
		if err := c.killAll(ctx, n); err != nil {
			return err
		}
	}
	if err := c.unrecordNode(ctx, n.ID); err != nil {
		return fmt.Errorf("remove node %s: %w", n.Name, err)
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "node removed", nodeAttr(n.ID), slog.Int("sandboxes", len(here)), slog.Bool("force", force))
	c.note(ctx, Event{Type: "node_removed", NodeID: n.ID, Message: fmt.Sprintf("node %s removed", n.Name)})
	return nil
}

// leaveNode removes a node that asks for it itself: of one that no command reaches, because nothing runs there any more, only
// what can be brought back elsewhere goes on. Errors: ErrConflict where it has more, unless force is set.
func (c *Control) leaveNode(ctx context.Context, id sandbox.NodeID, force bool) error {
	n, err := c.GetNode(ctx, string(id))
	if err != nil {
		return err
	}
	_, err = c.agent(id)
	away := err != nil || !c.fleet.isReady(id)
	if away && !force {
		only := c.index.at(id, func(e *entry) bool {
			_, kept := c.noted.replica(e.box.ID)
			return lostThere(e) || !e.box.State.Ended() && !kept
		})
		if len(only) > 0 {
			return sandbox.Conflictf("node %s has %d sandboxes that no other node has: `cloister node drain %s`, while it runs, moves them, --force ends them",
				n.Name, len(only), n.Name)
		}
	}
	return c.takeOut(ctx, n, force, away)
}

// killAll ends what a node that answers has.
func (c *Control) killAll(ctx context.Context, n Node) error {
	for _, id := range c.index.at(n.ID, func(e *entry) bool { return !e.box.State.Ended() }) {
		if err := c.Kill(ctx, id); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return fmt.Errorf("remove node %s: %w", n.Name, err)
		}
	}
	return nil
}

// recoverAll brings back, on other nodes, the paused sandboxes of a node that is given up. It returns an error for those that
// have a replica and cannot be brought back now.
func (c *Control) recoverAll(ctx context.Context, node sandbox.NodeID) error {
	view, err := c.copyView(ctx, time.Now())
	if err != nil {
		return err
	}
	plan := copyPlan{copyView: view}
	for i := range view.nodes {
		n := &view.nodes[i]
		n.givenUp, n.ready = n.givenUp || n.id == node, n.ready && n.id != node
	}
	view.skip = func(string) bool { return false }
	var errs []error
	for _, r := range view.records {
		if r.Home == node {
			errs = append(errs, c.recoverFrom(ctx, &plan, r))
		}
	}
	return errors.Join(errs...)
}

func (c *Control) recoverFrom(ctx context.Context, plan *copyPlan, r sandbox.Replica) error {
	to := plan.newHome(r)
	if to == nil {
		return sandbox.Unavailablef("sandbox %s has replicas and no node to be brought back on", r.ID)
	}
	if err := c.recoverBox(ctx, r, to.id); err != nil {
		return err
	}
	if now, ok := c.noted.replica(r.ID); ok && now.Home == r.Home {
		return sandbox.Unavailablef("sandbox %s is in use: try again", r.ID)
	}
	if p, ok := c.noted.placement(r.ID); ok && c.fleet.isReady(r.Home) {
		c.forgetCopy(ctx, r.ID, r.Home, p.Generation)
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
	for _, p := range c.noted.allPlacements() {
		if err := c.dropStale(ctx, p.ID, id); err != nil {
			return err
		}
	}
	return nil
}
