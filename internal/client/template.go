package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

func templatePath(idOrName string) string { return "/v1/templates/" + url.PathEscape(idOrName) }

// ListTemplates returns all templates, the oldest first.
func (c *Client) ListTemplates(ctx context.Context) ([]Template, error) {
	return get[[]Template](ctx, c, "/v1/templates")
}

// GetTemplate returns a template by name or id.
func (c *Client) GetTemplate(ctx context.Context, idOrName string) (Template, error) {
	return get[Template](ctx, c, templatePath(idOrName))
}

// CreateTemplate begins to make or rebuild a template; follow the answer's BuildID with FollowBuild.
func (c *Client) CreateTemplate(ctx context.Context, in CreateTemplate) (StartedBuild, error) {
	var out StartedBuild
	_, err := c.call(ctx, http.MethodPost, "/v1/templates", in, &out)
	return out, err
}

// DeleteTemplate deletes a template; running sandboxes stay.
func (c *Client) DeleteTemplate(ctx context.Context, idOrName string) error {
	_, err := c.call(ctx, http.MethodDelete, templatePath(idOrName), nil, nil)
	return err
}

// UpdateTemplate changes what is set of a template.
func (c *Client) UpdateTemplate(ctx context.Context, idOrName string, in UpdateTemplate) (Template, error) {
	var out Template
	_, err := c.call(ctx, http.MethodPatch, templatePath(idOrName), in, &out)
	return out, err
}

// SetPublic says whether everybody may use a template.
func (c *Client) SetPublic(ctx context.Context, idOrName string, public bool) (Template, error) {
	return c.UpdateTemplate(ctx, idOrName, UpdateTemplate{Public: &public})
}

// SetTags lets tags mean the build that another tag means.
func (c *Client) SetTags(ctx context.Context, idOrName string, in SetTags) (Template, error) {
	var out Template
	_, err := c.call(ctx, http.MethodPut, templatePath(idOrName)+"/tags", in, &out)
	return out, err
}

// RemoveTag takes a tag away; a build that no tag means any more goes with its files.
func (c *Client) RemoveTag(ctx context.Context, idOrName, tag string) error {
	_, err := c.call(ctx, http.MethodDelete, templatePath(idOrName)+"/tags/"+url.PathEscape(tag), nil, nil)
	return err
}

// PushTemplate begins to write a template to a registry or an archive; follow the answer's BuildID with FollowBuild.
func (c *Client) PushTemplate(ctx context.Context, idOrName string, in PushTemplate) (StartedBuild, error) {
	var out StartedBuild
	_, err := c.call(ctx, http.MethodPost, templatePath(idOrName)+"/push", in, &out)
	return out, err
}

// GetBuild returns a build with its log from offset on. Where there is nothing new, the server waits up to wait (at most
// a minute) for it.
func (c *Client) GetBuild(ctx context.Context, id string, offset int, wait time.Duration) (Build, error) {
	q := url.Values{"offset": {strconv.Itoa(offset)}, "wait": {strconv.Itoa(int(wait / time.Second))}}
	return get[Build](ctx, c, withQuery("/v1/builds/"+url.PathEscape(id), q))
}

// CancelBuild stops a build; what a finished one made stays.
func (c *Client) CancelBuild(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/builds/"+url.PathEscape(id), nil, nil)
	return err
}

// FollowBuild yields a build each time that there is something new, each time with the log entries that were not in
// those before, until it is ready or has failed and its whole log was yielded; that it failed is no error here. An error
// is the last that it yields.
func (c *Client) FollowBuild(ctx context.Context, id string) iter.Seq2[Build, error] {
	return func(yield func(Build, error) bool) {
		for offset := 0; ; {
			b, err := c.GetBuild(ctx, id, offset, followWait)
			if !yield(b, err) || err != nil || (b.State == BuildReady || b.State == BuildFailed) && len(b.Entries) == 0 {
				return
			}
			offset += len(b.Entries)
		}
	}
}

// FileStatus says how much of an archive of files the server has.
func (c *Client) FileStatus(ctx context.Context, hash string) (Upload, error) {
	return get[Upload](ctx, c, "/v1/files/"+url.PathEscape(hash))
}

// PutFile sends the part of an archive that begins at offset; complete says that it is the last.
func (c *Client) PutFile(ctx context.Context, hash string, offset int64, complete bool, body io.Reader) (Upload, error) {
	q := url.Values{"offset": {strconv.FormatInt(offset, 10)}, "complete": {strconv.FormatBool(complete)}}
	path := withQuery("/v1/files/"+url.PathEscape(hash), q)
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, c.base+path, body)
	if err != nil {
		return Upload{}, fmt.Errorf("send files %s: %w", hash, err)
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	if c.key != "" {
		req.Header.Set("X-Api-Key", c.key)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Upload{}, fmt.Errorf("send files %s: %w", hash, err)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return Upload{}, fmt.Errorf("send files %s: read the answer: %w", hash, err)
	}
	if resp.StatusCode/100 != 2 {
		return Upload{}, apiError(resp, text)
	}
	var out Upload
	if err := json.Unmarshal(text, &out); err != nil {
		return Upload{}, fmt.Errorf("send files %s: decode the answer: %w", hash, err)
	}
	return out, nil
}
