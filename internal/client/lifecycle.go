package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
)

func sandboxPath(id, verb string) string { return "/v1/sandboxes/" + url.PathEscape(id) + "/" + verb }

// PauseSandbox keeps a sandbox on disk and stops it. Kind is "memory", which empty means too, or "files".
func (c *Client) PauseSandbox(ctx context.Context, id, kind string) (Sandbox, error) {
	var out Sandbox
	_, err := c.call(ctx, http.MethodPost, sandboxPath(id, "pause"), PauseSandbox{Kind: kind}, &out)
	return out, err
}

// ResumeSandbox lets a paused sandbox go on; of one that runs it moves the end only later.
func (c *Client) ResumeSandbox(ctx context.Context, id string, in ResumeSandbox) (Sandbox, error) {
	var out Sandbox
	_, err := c.call(ctx, http.MethodPost, sandboxPath(id, "resume"), in, &out)
	return out, err
}

// CreateSnapshot keeps what a sandbox is at this moment; it goes on running.
func (c *Client) CreateSnapshot(ctx context.Context, id string, in CreateSnapshot) (Snapshot, error) {
	var out Snapshot
	_, err := c.call(ctx, http.MethodPost, sandboxPath(id, "snapshots"), in, &out)
	return out, err
}

// ForkSandbox makes copies of a sandbox, each with an outcome of its own; it goes on running.
func (c *Client) ForkSandbox(ctx context.Context, id string, in ForkSandbox) ([]Fork, error) {
	var out []Fork
	_, err := c.call(ctx, http.MethodPost, sandboxPath(id, "fork"), in, &out)
	return out, err
}

// RollbackSandbox puts a sandbox back to one of its own snapshots; it keeps its id.
func (c *Client) RollbackSandbox(ctx context.Context, id string, in RollbackSandbox) (Sandbox, error) {
	var out Sandbox
	_, err := c.call(ctx, http.MethodPost, sandboxPath(id, "rollback"), in, &out)
	return out, err
}

// ListSnapshots says which snapshots to list. The zero value is all of them.
type ListSnapshots struct {
	SandboxID string
	Name      string
	// Limit is the length of a page, 1 to 1000; 0 means 100.
	Limit int
	// Next is the token of the page; empty for the first.
	Next string
}

// ListSnapshots returns a page of snapshots, the newest first, and the token of the next, which is empty on the last.
func (c *Client) ListSnapshots(ctx context.Context, l ListSnapshots) ([]Snapshot, string, error) {
	q := url.Values{"sandbox": {l.SandboxID}, "name": {l.Name}, "limit": {number(int64(l.Limit))}, "next": {l.Next}}
	var out []Snapshot
	header, err := c.call(ctx, http.MethodGet, withQuery("/v1/snapshots", q), nil, &out)
	return out, header.Get(NextTokenHeader), err
}

// AllSnapshots yields every snapshot that matches, page by page, and at last an error if there was one.
func (c *Client) AllSnapshots(ctx context.Context, l ListSnapshots) iter.Seq2[Snapshot, error] {
	return pages(func(next string) ([]Snapshot, string, error) {
		l.Next = next
		return c.ListSnapshots(ctx, l)
	})
}

// DeleteSnapshot deletes a snapshot by id or name; sandboxes that were made of it stay.
func (c *Client) DeleteSnapshot(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/snapshots/"+url.PathEscape(id), nil, nil)
	return err
}
