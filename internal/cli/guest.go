package cli

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem/filesystemconnect"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
)

// maxMessage bounds one message of a sandbox's agent, in bytes.
const maxMessage = 64 << 20

// guestConn speaks to the agent inside one sandbox.
type guestConn struct {
	sandbox client.Sandbox
	base    string
	http    *http.Client
	// api answers what became of the sandbox when its agent no longer does.
	api     *client.Client
	process processconnect.ProcessClient
	files   filesystemconnect.FilesystemClient
}

// guestOf opens the way to the agent inside the sandbox, acting as the given user of it.
func (a *app) guestOf(ctx context.Context, id, user string) (*guestConn, error) {
	cn, err := a.target.connect()
	if err != nil {
		return nil, err
	}
	s, err := cn.api.GetSandbox(ctx, id)
	if err != nil {
		return nil, cn.check(err)
	}
	if s.State != "running" {
		return nil, fmt.Errorf("sandbox %s is %s%s: only a running one can be used", id, s.State, because(s.Reason))
	}
	return cn.open(ctx, s, user)
}

func (c *conn) open(ctx context.Context, s client.Sandbox, user string) (*guestConn, error) {
	base, err := c.guest(ctx, s.ID, guestPort)
	if err != nil {
		return nil, err
	}
	hc := &http.Client{Transport: &guestTransport{next: c.http.Transport, token: s.AccessToken, user: user}}
	return &guestConn{
		sandbox: s, base: base, http: hc, api: c.api,
		process: processconnect.NewProcessClient(hc, base, connect.WithReadMaxBytes(maxMessage)),
		files:   filesystemconnect.NewFilesystemClient(hc, base, connect.WithReadMaxBytes(maxMessage)),
	}, nil
}

// fate returns an error that says what became of the sandbox, or nil where it runs or nobody knows.
func (g *guestConn) fate(ctx context.Context) error {
	const news = 2 * time.Second // the end of a sandbox is known a little after it
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), news)
	defer cancel()
	for ctx.Err() == nil {
		s, err := g.api.GetSandbox(ctx, g.sandbox.ID)
		switch {
		case client.IsNotFound(err):
			return fmt.Errorf("sandbox %s has ended", g.sandbox.ID)
		case err != nil:
			return nil
		case s.State != "running":
			return fmt.Errorf("sandbox %s is %s%s", s.ID, s.State, because(s.Reason))
		}
		wait(ctx, news/20)
	}
	return nil
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}

// guestTransport adds what the agent inside a sandbox demands of each request.
type guestTransport struct {
	next        http.RoundTripper
	token, user string
}

func (t *guestTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	if t.token != "" {
		r.Header.Set("X-Access-Token", t.token)
	}
	if t.user != "" {
		r.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(t.user+":")))
	}
	return t.next.RoundTrip(r)
}
