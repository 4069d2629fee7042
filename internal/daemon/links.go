package daemon

import (
	"context"
	"net"

	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// links are a server's ways to the nodes that joined: calls go over their links, bytes directly where a node can be dialed.
type links struct {
	hub   *link.Hub
	reach *link.Reach
	// route says where a node can be dialed.
	route func(sandbox.NodeID) (sandbox.NodeRoute, bool)
}

// Agent returns a node's command interface; false while it has no link.
func (l *links) Agent(id sandbox.NodeID) (agentv1connect.AgentServiceClient, bool) {
	if !l.hub.Connected(sandbox.Member{Role: sandbox.RoleNode, ID: string(id)}) {
		return nil, false
	}
	return agentv1connect.NewAgentServiceClient(l.hub.NodeClient(id), link.BaseURL), true
}

// DialGuest connects to a port of a sandbox on a node.
func (l *links) DialGuest(ctx context.Context, node sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error) {
	at, _ := l.route(node) // one that is unknown has no link either, which the answer says
	return l.reach.Dial(ctx, link.Endpoint{Node: node, Address: at.Address}, link.GuestHead(node, id, port))
}

// DialPeer connects to what a node serves to others, for the node of the server's own process.
func (l *links) DialPeer(ctx context.Context, node sandbox.NodeID, address string) (net.Conn, error) {
	return l.reach.Dial(ctx, link.Endpoint{Node: node, Address: address}, link.Head{Kind: link.Artifact})
}
