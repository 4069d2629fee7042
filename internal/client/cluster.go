package client

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Status returns the cluster at one glance.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, "/v1/status")
}

// Keys returns all API keys, the oldest first.
func (c *Client) Keys(ctx context.Context) ([]Key, error) { return get[[]Key](ctx, c, "/v1/keys") }

// CreateKey makes an API key; the answer is the only one that holds it.
func (c *Client) CreateKey(ctx context.Context, name string) (CreatedKey, error) {
	var out CreatedKey
	_, err := c.call(ctx, http.MethodPost, "/v1/keys", CreateKey{Name: name}, &out)
	return out, err
}

// RevokeKey makes a key useless at once.
func (c *Client) RevokeKey(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/keys/"+url.PathEscape(id), nil, nil)
	return err
}

// ListEvents says which events to return, always in order of id. The zero value is the newest of all; from After or
// Since on, it is the first ones from there, so that a caller can go on from the last id.
type ListEvents struct {
	SandboxID string
	Type      string
	Since     time.Time
	// After leaves out the events up to this id.
	After int64
	// Limit is 1 to 1000; 0 means 100.
	Limit int
}

// Events returns what happened, in order of id.
func (c *Client) Events(ctx context.Context, l ListEvents) ([]Event, error) {
	q := url.Values{
		"sandbox": {l.SandboxID}, "type": {l.Type}, "since": {moment(l.Since)}, "after": {number(l.After)},
		"limit": {number(int64(l.Limit))},
	}
	return get[[]Event](ctx, c, withQuery("/v1/events", q))
}

// OpenAPI returns the document that describes the API.
func (c *Client) OpenAPI(ctx context.Context) (map[string]any, error) {
	return get[map[string]any](ctx, c, "/v1/openapi.json")
}
