package client

import (
	"context"
	"net/http"
	"net/url"
)

// Taint keeps sandboxes off a node that do not tolerate it.
type Taint struct {
	Key   string `json:"key"`
	Value string `json:"value,omitempty"`
	// Effect is "NoSchedule" or "PreferNoSchedule"; empty, where a taint is removed, means both.
	Effect string `json:"effect,omitempty"`
}

// UpdateNode is the body of PATCH /v1/nodes/{id}; the answer is a Node. What is left out stays as it is.
type UpdateNode struct {
	// Labels sets labels; null takes one away.
	Labels map[string]*string `json:"labels,omitempty"`
	// AddTaints sets taints, in place of those with the same key and effect.
	AddTaints    []Taint `json:"add_taints,omitempty"`
	RemoveTaints []Taint `json:"remove_taints,omitempty"`
	// Cordoned says whether the node gets new sandboxes, Reason why not.
	Cordoned *bool  `json:"cordoned,omitempty"`
	Reason   string `json:"reason,omitempty"`
}

// Nodes returns all nodes, in order of name.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) { return get[[]Node](ctx, c, "/v1/nodes") }

// Node returns a node by id or name.
func (c *Client) Node(ctx context.Context, idOrName string) (Node, error) {
	return get[Node](ctx, c, "/v1/nodes/"+url.PathEscape(idOrName))
}

// UpdateNode changes what the administrator wants of a node and returns the node.
func (c *Client) UpdateNode(ctx context.Context, idOrName string, u UpdateNode) (Node, error) {
	var out Node
	_, err := c.call(ctx, http.MethodPatch, "/v1/nodes/"+url.PathEscape(idOrName), u, &out)
	return out, err
}
