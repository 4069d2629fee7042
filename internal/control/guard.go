package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// permit makes sure that nobody brings a sandbox back elsewhere while its node makes it run: until release is called,
// nothing else is decided about it here, and the record by which it could be brought back is gone. h follows a sandbox that
// was moved meanwhile. Errors: ErrUnavailable for one that is being brought back.
func (c *Control) permit(ctx context.Context, h *held) (permitted bool, release func(), err error) {
	for {
		release, err = c.busy.take(ctx, h.box.ID)
		if err != nil {
			return false, nil, err
		}
		box, ok := c.index.get(h.box.ID)
		if !ok || box.NodeID == h.box.NodeID && box.State != sandbox.StateMigrating {
			if !c.noted.isBereft(h.box.ID) {
				break
			}
			release()
			return false, nil, sandbox.Unavailablef("sandbox %s is being brought back: its node %s has lost it; try again", h.box.ID, h.box.NodeID)
		}
		release()
		if *h, err = c.hold(ctx, h.box.ID); err != nil {
			return false, nil, err
		}
	}
	if err := c.unguard(ctx, h.box.ID); err != nil {
		release()
		return false, nil, err
	}
	return true, release, nil
}

// unguard removes the record by which a paused sandbox could be brought back elsewhere, by compare-and-swap. The caller
// has the sandbox to itself. Errors: ErrUnavailable where it is being brought back, or the store does not answer.
func (c *Control) unguard(ctx context.Context, id sandbox.ID) error {
	r, ok := c.noted.replica(id)
	if !ok {
		return nil
	}
	if r.Returning {
		return sandbox.Unavailablef("sandbox %s is being brought back on node %s: try again", id, r.Home)
	}
	err := c.replicas.RemoveReplica(ctx, r)
	switch {
	case err == nil, errors.Is(err, sandbox.ErrNotFound):
		c.noted.setReplica(id, nil)
		return nil
	case errors.Is(err, sandbox.ErrConflict):
		return errors.Join(sandbox.Unavailablef("sandbox %s is being brought back by another server: try again", id), c.reloadReplica(ctx, id))
	}
	return fmt.Errorf("give up the replicas of sandbox %s: %w", id, err)
}

// reloadReplica takes a sandbox's record from the store.
func (c *Control) reloadReplica(ctx context.Context, id sandbox.ID) error {
	all, err := c.replicas.Replicas(ctx)
	if err != nil {
		return fmt.Errorf("read the replicas: %w", err)
	}
	i := slices.IndexFunc(all, func(r sandbox.Replica) bool { return r.ID == id })
	if i < 0 {
		c.noted.setReplica(id, nil)
		return nil
	}
	c.noted.setReplica(id, &all[i])
	return nil
}

// guard records that a paused sandbox can be brought back without its node. The node agrees first: it resumes the sandbox
// only for a server from then on. Errors: ErrConflict where the sandbox is not as it was when it was copied.
func (c *Control) guard(ctx context.Context, r sandbox.Replica) error {
	release, ok := c.busy.try(r.ID)
	if !ok {
		return sandbox.Conflictf("sandbox %s is in use", r.ID)
	}
	defer release()
	box, ok := c.index.get(r.ID)
	if !ok || box.State != sandbox.StatePaused || box.Generation != r.Generation || box.NodeID != r.Home {
		return sandbox.Conflictf("sandbox %s is not paused as it was", r.ID)
	}
	agent, err := c.agent(r.Home)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	_, err = agent.Guard(ctx, &agentv1.GuardRequest{Id: string(r.ID), Generation: r.Generation, Guarded: true})
	if err = fromNode(r.Home, err); err != nil {
		return fmt.Errorf("node %s: guard sandbox %s: %w", r.Home, r.ID, err)
	}
	old, had := c.noted.replica(r.ID)
	if had {
		err = c.replicas.UpdateReplica(ctx, old, r)
	} else {
		err = c.replicas.CreateReplica(ctx, r)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("record the replicas of sandbox %s: %w", r.ID, err), c.reloadReplica(ctx, r.ID))
	}
	c.noted.setReplica(r.ID, &r)
	c.note(ctx, Event{Type: "replicated", NodeID: r.Home, SandboxID: r.ID, Message: "a copy of what it is paused in is kept by " + c.keepers(&r)})
	return nil
}

// keepers names who can bring a sandbox back beside its node.
func (c *Control) keepers(r *sandbox.Replica) string {
	all := make([]string, 0, len(r.Holders)+1)
	for _, h := range r.Holders {
		all = append(all, "node "+c.fleet.nameOf(h))
	}
	if r.Bucket {
		all = append(all, "the bucket")
	}
	return strings.Join(all, ", ")
}

// recoverBox has a holder of its checkpoint become the home of a paused sandbox whose node is given up, and has it take it.
func (c *Control) recoverBox(ctx context.Context, r sandbox.Replica, to sandbox.NodeID) error {
	release, ok := c.busy.try(r.ID)
	if !ok {
		return nil // it is decided elsewhere; the next round sees what came of it
	}
	defer release()
	if c.noted.doomed(r.ID) {
		return nil
	}
	next := r
	next.Home, next.Generation, next.Returning = to, r.Generation+1, true
	next.Holders = slices.DeleteFunc(slices.Clone(r.Holders), func(n sandbox.NodeID) bool { return n == to })
	p, _ := c.noted.placement(r.ID)
	next.Generation = max(next.Generation, p.Generation+1) // 0 where there is none
	at := sandbox.Placement{ID: r.ID, Node: to, Generation: next.Generation}
	at.AddStale(r.Home)
	if err := c.replicas.MoveReplica(ctx, r, next, at); err != nil {
		return errors.Join(fmt.Errorf("bring sandbox %s back: %w", r.ID, err), c.reloadReplica(ctx, r.ID))
	}
	c.noted.setReplica(r.ID, &next)
	if err := c.reloadPlacement(ctx, r.ID); err != nil {
		return err
	}
	return c.takeReplica(ctx, next)
}

// finishRecovery has the new home of a sandbox take it, where an earlier attempt broke off.
func (c *Control) finishRecovery(ctx context.Context, r sandbox.Replica) error {
	release, ok := c.busy.try(r.ID)
	if !ok {
		return nil
	}
	defer release()
	return c.takeReplica(ctx, r)
}

// takeReplica has a node go on with a sandbox from the copy that it, or the bucket, has. It is paused there, and not guarded
// until it is copied again.
func (c *Control) takeReplica(ctx context.Context, r sandbox.Replica) error {
	agent, err := c.agent(r.Home)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, moveDeadline)
	defer cancel()
	if err := c.fetch(ctx, r.Home, &agentv1.FetchRequest{ImageDigest: r.ImageDigest, TemplateId: string(r.TemplateID)}); err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "image of a lost sandbox not fetched", slog.String("sandbox_id", string(r.ID)), nodeAttr(r.Home), errAttr(err))
	}
	req := &agentv1.ReceiveRequest{CheckpointId: r.Checkpoint, Bucket: r.Bucket, Generation: r.Generation}
	for _, h := range r.Holders {
		req.Peers = append(req.Peers, c.fleet.peer(h))
	}
	if box, ok := c.index.get(r.ID); !ok || box.NodeID != r.Home || box.Generation < r.Generation {
		if _, err = agent.Receive(ctx, req); err != nil && !errors.Is(fromNode(r.Home, err), sandbox.ErrConflict) {
			return fmt.Errorf("bring sandbox %s back on node %s: %w", r.ID, r.Home, fromNode(r.Home, err))
		}
		if _, err = c.arrive(ctx, r.ID, r.Home, r.Generation); err != nil {
			return err
		}
		c.note(ctx, Event{Type: "recovered", NodeID: r.Home, SandboxID: r.ID, Message: "brought back from a replica: its node was lost"})
	}
	c.copies.drop(r.Home, r.Checkpoint)
	if err := c.replicas.RemoveReplica(ctx, r); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return errors.Join(err, c.reloadReplica(ctx, r.ID))
	}
	c.noted.setReplica(r.ID, nil)
	return nil
}
