package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

func isDir(e *filesystem.EntryInfo) bool {
	return e.GetType() == filesystem.FileType_FILE_TYPE_DIRECTORY
}

// perm is what a copy of e may have: its permissions without those that would run it as another user.
func perm(e *filesystem.EntryInfo) fs.FileMode { return fs.FileMode(e.GetMode()) & fs.ModePerm }

func (g *guestConn) stat(ctx context.Context, remote string) (*filesystem.EntryInfo, error) {
	r, err := g.files.Stat(ctx, &filesystem.StatRequest{Path: remote})
	if err != nil {
		return nil, g.fileError(ctx, "look at", remote, err)
	}
	return r.GetEntry(), nil
}

func (g *guestConn) isDir(ctx context.Context, remote string) bool {
	r, err := g.files.Stat(ctx, &filesystem.StatRequest{Path: remote})
	return err == nil && isDir(r.GetEntry())
}

// makeDir makes a directory and returns its absolute path.
func (g *guestConn) makeDir(ctx context.Context, remote string) (string, error) {
	r, err := g.files.MakeDir(ctx, &filesystem.MakeDirRequest{Path: remote})
	if err != nil {
		return "", g.fileError(ctx, "make directory", remote, err)
	}
	return r.GetEntry().GetPath(), nil
}

// list returns a directory's absolute path and what is below it, levels deep.
func (g *guestConn) list(ctx context.Context, remote string, levels uint32) (string, []*filesystem.EntryInfo, error) {
	e, err := g.stat(ctx, remote)
	if err != nil {
		return "", nil, err
	}
	r, err := g.files.ListDir(ctx, &filesystem.ListDirRequest{Path: e.GetPath(), Depth: levels})
	if err != nil {
		return "", nil, g.fileError(ctx, "list", remote, err)
	}
	return e.GetPath(), r.GetEntries(), nil
}

// fileError words an error of the agent, or what became of the sandbox where there is no agent any more.
func (g *guestConn) fileError(ctx context.Context, op, remote string, err error) error {
	wire, isConnect := errors.AsType[*connect.Error](err)
	_, answered := errors.AsType[*client.APIError](err)
	if !answered && (!isConnect || !connect.IsWireError(wire)) && ctx.Err() == nil {
		if fate := g.fate(ctx); fate != nil {
			err = fate
		}
	}
	return fmt.Errorf("%s %q: %w", op, remote, startError(err))
}

func (g *guestConn) filesURL(remote string) string {
	return g.base + "/files?path=" + url.QueryEscape(remote)
}

// upload writes length bytes of r, or all where that is -1, to a file of the sandbox and returns its absolute path.
func (g *guestConn) upload(ctx context.Context, remote string, r io.Reader, length int64) (string, error) {
	if length == 0 {
		r = http.NoBody // else an unknown length
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.filesURL(remote), io.NopCloser(r))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	req.ContentLength = length
	resp, err := g.http.Do(req)
	if err != nil {
		return "", g.fileError(ctx, "upload", remote, err)
	}
	defer func() { _ = resp.Body.Close() }() // read below
	if resp.StatusCode/100 != 2 {
		return "", g.fileError(ctx, "upload", remote, guestError(resp))
	}
	var written []struct {
		Path string `json:"path"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&written); err != nil || len(written) != 1 {
		return "", fmt.Errorf("upload %q: the sandbox's answer names no file", remote)
	}
	return written[0].Path, nil
}

// download writes a file of the sandbox to what open returns, which is asked only once the sandbox sends.
func (g *guestConn) download(ctx context.Context, remote string, open func() (io.Writer, error)) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.filesURL(remote), http.NoBody)
	if err != nil {
		return err
	}
	req.Header.Set("Accept-Encoding", "identity") // the way is short: packing would cost more than it saves
	resp, err := g.http.Do(req)
	if err != nil {
		return g.fileError(ctx, "download", remote, err)
	}
	defer func() { _ = resp.Body.Close() }() // read below
	if resp.StatusCode/100 != 2 {
		return g.fileError(ctx, "download", remote, guestError(resp))
	}
	w, err := open()
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("download %q: %w", remote, err)
	}
	return nil
}

// guestError reads the error body that the agent or the proxy sent.
func guestError(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // an unreadable body leaves the status
	var e client.Error
	if json.Unmarshal(body, &e) == nil && e.Message != "" {
		return &client.APIError{Code: resp.StatusCode, Message: e.Message}
	}
	return &client.APIError{Code: resp.StatusCode, Message: resp.Status}
}
