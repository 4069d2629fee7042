package control

import "github.com/cloister-dev/cloister/internal/sandbox"

// NodeRoute says how a node is reached; false where it is unknown.
func (c *Control) NodeRoute(id sandbox.NodeID) (sandbox.NodeRoute, bool) { return c.routes.node(id) }
