package daemon

import (
	"context"
	"net"
	"sync/atomic"

	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// fleet reaches nodes: that of this process directly, the others over their links.
type fleet struct {
	// local is set once, before the first request; nil without a node in this process.
	local *nodeRole
	// links is set with the cluster's port.
	links atomic.Pointer[links]
}

// Agent returns a node's command interface; false while the node is not connected.
func (f *fleet) Agent(id sandbox.NodeID) (agentv1connect.AgentServiceClient, bool) {
	if f.local != nil && id == f.local.agent.NodeID() {
		return f.local.agent, true
	}
	if l := f.links.Load(); l != nil {
		return l.Agent(id)
	}
	return nil, false
}

// DialGuest connects to a port of a sandbox on a node.
func (f *fleet) DialGuest(ctx context.Context, node sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error) {
	if f.local != nil && node == f.local.agent.NodeID() {
		return f.local.agent.DialGuest(ctx, id, port)
	}
	if l := f.links.Load(); l != nil {
		return l.DialGuest(ctx, node, id, port)
	}
	return nil, sandbox.Unavailablef("node %s is not connected", node)
}
