package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Get returns a sandbox; failed and lost ones stay findable for a while, with their reason. Errors: ErrNotFound.
func (c *Control) Get(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	box, err := c.locate(ctx, id)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if box.State == sandbox.StateDeleted {
		return sandbox.Sandbox{}, gone(box)
	}
	c.slide(&box, time.Now())
	return box, nil
}

// AccessToken returns the token that the agent inside a sandbox demands, or "" where it demands none.
func (c *Control) AccessToken(box sandbox.Sandbox) string {
	if !box.Secure {
		return ""
	}
	return sandbox.AccessToken(c.secret, box.ID)
}

func gone(box sandbox.Sandbox) error {
	if box.Reason == "" {
		return sandbox.NotFoundf("sandbox %s is gone", box.ID)
	}
	return sandbox.NotFoundf("sandbox %s is gone: %s", box.ID, box.Reason)
}

func unknown(id sandbox.ID) error { return sandbox.NotFoundf("sandbox %s was not found", id) }

// locate returns what is known of a sandbox, a deleted one included. One that the index lacks, as after a restart of
// the server or when another server made it, is asked for at the node that its id names.
func (c *Control) locate(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	if box, ok := c.index.get(id); ok {
		return box, nil
	}
	node := c.homeOf(id)
	if node == "" {
		return sandbox.Sandbox{}, unknown(id)
	}
	agent, ok := c.agents.Agent(node)
	if !ok {
		return sandbox.Sandbox{}, c.unreachable(id, node)
	}
	// Anybody can make up ids: this many a second may trouble the nodes.
	if c.noted.doomed(id) || !c.lookups.Allow() {
		return sandbox.Sandbox{}, unknown(id)
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Get(ctx, &agentv1.GetRequest{Id: string(id)})
	if err = fromNode(node, err); errors.Is(err, sandbox.ErrNotFound) {
		return c.locateMoved(ctx, id, node)
	}
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	return c.learn(node, resp.GetSandbox())
}

// homeOf returns the node that a sandbox was moved to, as far as this server knows, or the one that made it.
func (c *Control) homeOf(id sandbox.ID) sandbox.NodeID {
	if p, ok := c.noted.placement(id); ok && !p.Ended {
		return p.Node
	}
	return id.Node()
}

// locateMoved looks for a sandbox that a node has not, as another server may have moved it.
func (c *Control) locateMoved(ctx context.Context, id sandbox.ID, asked sandbox.NodeID) (sandbox.Sandbox, error) {
	if err := c.reloadPlacement(ctx, id); err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("find sandbox %s: %w", id, err)
	}
	node := c.homeOf(id)
	agent, ok := c.agents.Agent(node)
	if node == asked || !ok {
		return sandbox.Sandbox{}, unknown(id)
	}
	resp, err := agent.Get(ctx, &agentv1.GetRequest{Id: string(id)})
	if err = fromNode(node, err); errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Sandbox{}, unknown(id)
	}
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	return c.learn(node, resp.GetSandbox())
}

// unreachable tells an id that nobody can have from one whose node is away.
func (c *Control) unreachable(id sandbox.ID, node sandbox.NodeID) error {
	if !c.fleet.has(node) {
		return unknown(id)
	}
	return sandbox.Unavailablef("sandbox %s: its node %s is not connected", id, node)
}

// endsHere notes that a node no longer has a sandbox that the index holds as live: what was known is void.
func (c *Control) endsHere(id sandbox.ID, reason string) {
	now := time.Now()
	c.index.change(id, now, func(e *entry) bool {
		if e.box.State == sandbox.StateDeleted {
			return false
		}
		e.box.State, e.box.Reason, e.box.EndedAt = sandbox.StateDeleted, reason, now
		return true
	})
}
