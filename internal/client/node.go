package client

import (
	"context"
	"net/http"
	"net/url"
	"time"
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

// Drain is how far a node has been emptied.
type Drain struct {
	StartedAt time.Time `json:"started_at"`
	// Deadline is when the attempt is given up or, with Force, what is left is ended.
	Deadline time.Time `json:"deadline,omitzero"`
	// DoneAt is when nothing was left, or it was given up; Error says why in the second case.
	DoneAt time.Time `json:"done_at,omitzero"`
	Error  string    `json:"error,omitempty"`
	Force  bool      `json:"force"`
	// Moved and Ended count sandboxes, Left is how many are there still.
	Moved int `json:"moved"`
	Ended int `json:"ended"`
	Left  int `json:"left"`
	// Stuck says why nothing can be moved at present; empty while it goes on.
	Stuck string `json:"stuck,omitempty"`
	// Waiting says what else is waited for.
	Waiting []string `json:"waiting,omitempty"`
	// Failed are sandboxes that could not be moved at the last attempt.
	Failed []DrainFailure `json:"failed,omitempty"`
}

// DrainFailure is why a sandbox could not be moved.
type DrainFailure struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

// DrainNode is the body of POST /v1/nodes/{id}/drain; the answer is a Node.
type DrainNode struct {
	// TimeoutSeconds is how long to try; 0 is as long as it takes.
	TimeoutSeconds int64 `json:"timeout_seconds,omitempty"`
	// MaxParallel is how many sandboxes are moved at once; 0 means 4.
	MaxParallel int `json:"max_parallel,omitempty"`
	// Force ends what cannot be moved.
	Force  bool   `json:"force,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// DrainNode has a node give its sandboxes to others; it returns at once, and Node shows how far that is.
func (c *Client) DrainNode(ctx context.Context, idOrName string, d DrainNode) (Node, error) {
	var out Node
	_, err := c.call(ctx, http.MethodPost, "/v1/nodes/"+url.PathEscape(idOrName)+"/drain", d, &out)
	return out, err
}

// RemoveNode takes a node out of the cluster; with force also one that has sandboxes, which end.
func (c *Client) RemoveNode(ctx context.Context, idOrName string, force bool) error {
	path := "/v1/nodes/" + url.PathEscape(idOrName)
	if force {
		path += "?force=true"
	}
	_, err := c.call(ctx, http.MethodDelete, path, nil, nil)
	return err
}
