package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// The states of a build.
const (
	BuildWaiting  = "waiting"
	BuildBuilding = "building"
	BuildReady    = "ready"
	BuildFailed   = "failed"
)

// followWait is how long one request of FollowBuild waits for news.
const followWait = 20 * time.Second

// Templates returns all templates, the oldest first.
func (c *Client) Templates(ctx context.Context) ([]Template, error) {
	return get[[]Template](ctx, c, "/v1/templates")
}

// Template returns a template by name or id.
func (c *Client) Template(ctx context.Context, idOrName string) (Template, error) {
	return get[Template](ctx, c, "/v1/templates/"+url.PathEscape(idOrName))
}

// CreateTemplate begins to make or rebuild a template; follow the answer's BuildID with FollowBuild.
func (c *Client) CreateTemplate(ctx context.Context, in CreateTemplate) (StartedBuild, error) {
	var out StartedBuild
	_, err := c.call(ctx, http.MethodPost, "/v1/templates", in, &out)
	return out, err
}

// DeleteTemplate deletes a template; running sandboxes stay.
func (c *Client) DeleteTemplate(ctx context.Context, idOrName string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/templates/"+url.PathEscape(idOrName), nil, nil)
	return err
}

// Build returns a build with its log from offset on. Where there is nothing new, the server waits up to wait (at most
// a minute) for it.
func (c *Client) Build(ctx context.Context, id string, offset int, wait time.Duration) (Build, error) {
	q := url.Values{"offset": {strconv.Itoa(offset)}, "wait": {strconv.Itoa(int(wait / time.Second))}}
	return get[Build](ctx, c, withQuery("/v1/builds/"+url.PathEscape(id), q))
}

// FollowBuild yields a build each time that there is something new, each time with the log entries that were not in
// those before, until it is ready or has failed and its whole log was yielded; that it failed is no error here. An error
// is the last that it yields.
func (c *Client) FollowBuild(ctx context.Context, id string) iter.Seq2[Build, error] {
	return func(yield func(Build, error) bool) {
		for offset := 0; ; {
			b, err := c.Build(ctx, id, offset, followWait)
			if !yield(b, err) || err != nil || (b.State == BuildReady || b.State == BuildFailed) && len(b.Entries) == 0 {
				return
			}
			offset += len(b.Entries)
		}
	}
}
