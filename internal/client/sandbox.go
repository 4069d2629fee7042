package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// ListSandboxes says which sandboxes to list. The zero value is all of them.
type ListSandboxes struct {
	States   []string
	Metadata map[string]string
	// Template is a name or an id.
	Template string
	// Limit is the length of a page, 1 to 1000; 0 means 100.
	Limit int
	// Next is the token of the page; empty for the first.
	Next string
}

// Sandboxes returns a page of sandboxes, the newest first, and the token of the next, which is empty on the last.
func (c *Client) Sandboxes(ctx context.Context, l ListSandboxes) ([]Sandbox, string, error) {
	q := url.Values{
		"state": {strings.Join(l.States, ",")}, "template": {l.Template}, "limit": {number(int64(l.Limit))}, "next": {l.Next},
	}
	for k, v := range l.Metadata {
		q.Add("metadata", k+"="+v)
	}
	slices.Sort(q["metadata"])
	var out []Sandbox
	header, err := c.call(ctx, http.MethodGet, withQuery("/v1/sandboxes", q), nil, &out)
	return out, header.Get(NextTokenHeader), err
}

// AllSandboxes yields every sandbox that matches, page by page, and at last an error if there was one.
func (c *Client) AllSandboxes(ctx context.Context, l ListSandboxes) iter.Seq2[Sandbox, error] {
	return pages(func(next string) ([]Sandbox, string, error) {
		l.Next = next
		return c.Sandboxes(ctx, l)
	})
}

// CreateSandbox starts a sandbox and returns it running, with its access token.
func (c *Client) CreateSandbox(ctx context.Context, in CreateSandbox) (Sandbox, error) {
	var out Sandbox
	_, err := c.call(ctx, http.MethodPost, "/v1/sandboxes", in, &out)
	return out, err
}

// GetSandbox returns a sandbox with its access token.
func (c *Client) GetSandbox(ctx context.Context, id string) (Sandbox, error) {
	return get[Sandbox](ctx, c, "/v1/sandboxes/"+url.PathEscape(id))
}

// KillSandbox ends a sandbox.
func (c *Client) KillSandbox(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/sandboxes/"+url.PathEscape(id), nil, nil)
	return err
}

// SetTimeout moves a sandbox's end.
func (c *Client) SetTimeout(ctx context.Context, id string, in SetTimeout) (Sandbox, error) {
	var out Sandbox
	_, err := c.call(ctx, http.MethodPost, "/v1/sandboxes/"+url.PathEscape(id)+"/timeout", in, &out)
	return out, err
}

// Logs returns a sandbox's log from start on, the oldest first, at most limit entries; 0 means 1000.
func (c *Client) Logs(ctx context.Context, id string, start time.Time, limit int) ([]LogEntry, error) {
	q := url.Values{"start": {moment(start)}, "limit": {number(int64(limit))}}
	return get[[]LogEntry](ctx, c, withQuery("/v1/sandboxes/"+url.PathEscape(id)+"/logs", q))
}

// Metrics returns a sandbox's samples, the oldest first; zero times do not bound.
func (c *Client) Metrics(ctx context.Context, id string, start, end time.Time) ([]Metric, error) {
	q := url.Values{"start": {moment(start)}, "end": {moment(end)}}
	return get[[]Metric](ctx, c, withQuery("/v1/sandboxes/"+url.PathEscape(id)+"/metrics", q))
}
