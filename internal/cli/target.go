package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/config"
)

// guestPort is where the agent inside a sandbox listens.
const guestPort = 49983

// target says which daemon a command talks to.
type target struct {
	dataDir, apiURL, key, sandboxURL string
	// flagged reports whether a flag was given, so that its value does not come from the environment.
	flagged func(name string) bool
	// root says that this process may open the socket.
	root bool
	// made are the connections to close at the end.
	made []*conn
}

func (t *target) close() {
	for _, c := range t.made {
		c.api.Close()
		c.http.CloseIdleConnections()
	}
}

// unreachableError means that no daemon answered.
type unreachableError struct {
	where string
	err   error
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("no daemon answers at %s (%v); is `cloister up` running? --api-url and --api-key reach another machine", e.where, e.err)
}
func (e *unreachableError) Unwrap() error { return e.err }

func (t *target) flags(c *cobra.Command, environ []string) {
	env := config.ClientFromEnvironment(environ)
	f := c.PersistentFlags()
	t.flagged, t.root = f.Changed, os.Geteuid() == 0
	f.StringVar(&t.dataDir, "data-dir", env.DataDir, "`directory` of the daemon on this machine [CLOISTER_DATA_DIR]")
	f.StringVar(&t.apiURL, "api-url", env.APIURL, "`URL` of a daemon elsewhere [CLOISTER_API_URL, E2B_API_URL]")
	f.StringVar(&t.sandboxURL, "sandbox-url", env.SandboxURL, "`URL` of its proxy; default: the one that it names [CLOISTER_SANDBOX_URL, E2B_SANDBOX_URL]")
	f.StringVar(&t.key, "api-key", "", "API `key` for --api-url [CLOISTER_API_KEY, E2B_API_KEY]")
	if t.key == "" {
		t.key = env.Key // not the flag's default: help texts print defaults
	}
}

func (t *target) socket() string { return filepath.Join(t.dataDir, "cloister.sock") }

// conn is a way to one daemon and to the sandboxes behind it.
type conn struct {
	api   *client.Client
	where string
	http  *http.Client
	// base is the URL of the API, key what it wants to see; no key is needed over the socket.
	base, key string
	// proxy is the base URL of sandbox traffic; empty until asked for.
	proxy string
	local bool
}

// connect returns the way to the daemon that flags and environment name.
func (t *target) connect() (*conn, error) {
	c, err := t.dial()
	if err != nil {
		return nil, err
	}
	t.made = append(t.made, c)
	return c, nil
}

func (t *target) dial() (*conn, error) {
	if t.useSocket() {
		path := t.socket()
		dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}
		hc := &http.Client{Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute}}
		return &conn{api: client.NewLocal(path), where: path, http: hc, base: "http://cloister", proxy: "http://cloister", local: true}, nil
	}
	base := t.apiURL
	if base == "" {
		base = "http://127.0.0.1:3000"
	}
	if u, err := url.Parse(base); err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, &usageError{fmt.Errorf("API URL %q: want http://HOST:PORT or https://HOST", base)}
	}
	if t.key == "" {
		return nil, &usageError{fmt.Errorf("no API key for %s: set E2B_API_KEY or --api-key, or run as root on the daemon's machine without a URL", base)}
	}
	hc := &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute}}
	return &conn{api: client.New(base, t.key), where: base, http: hc, base: strings.TrimSuffix(base, "/"), key: t.key, proxy: t.sandboxURL}, nil
}

// useSocket reports whether the unix socket of this machine's daemon is the way: for root, unless a URL was given. A flag
// goes before the environment.
func (t *target) useSocket() bool {
	switch {
	case t.flagged("api-url"):
		return false
	case t.flagged("data-dir"):
		return t.root
	case t.apiURL != "":
		return false
	case t.key == "":
		return t.root
	}
	_, err := os.Stat(t.socket())
	return t.root && err == nil
}

// check turns a failure to connect into one that says what to do.
func (c *conn) check(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return &unreachableError{where: c.where, err: op.Err}
	}
	return err
}

// guest returns the base URL of a port inside a sandbox.
func (c *conn) guest(ctx context.Context, id string, port int) (string, error) {
	if c.proxy == "" {
		st, err := c.api.Status(ctx)
		if err != nil {
			return "", c.check(err)
		}
		c.proxy = st.ProxyURL
	}
	return fmt.Sprintf("%s/sandbox/%s/%d", strings.TrimSuffix(c.proxy, "/"), url.PathEscape(id), port), nil
}

// ping waits until the daemon answers, at most for d.
func (c *conn) ping(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	_, err := c.api.Status(ctx)
	return c.check(err)
}
