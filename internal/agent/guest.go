package agent

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// What the node reads of a guest's answer at most: the guest is hostile.
const (
	maxGuestHead = 64 << 10
	maxGuestText = 1 << 10
	maxGuestLogs = 4 << 20
)

// guestConn is one HTTP/1.1 connection to the agent inside a sandbox. It is used by one goroutine at a time. It is much
// smaller than an http.Transport's, which counts with a warm pool, and takes no more from the guest than it should.
type guestConn struct {
	conn    net.Conn
	limited io.LimitedReader
	reader  *bufio.Reader
	used    bool // it has carried an answer
}

func newGuestConn(c net.Conn) *guestConn {
	g := &guestConn{conn: c}
	g.limited.R = c
	g.reader = bufio.NewReaderSize(&g.limited, 2<<10)
	return g
}

// close closes the connection; a nil one is closed already.
func (g *guestConn) close() {
	if g != nil {
		_ = g.conn.Close() // nothing is lost with it
	}
}

// answer is what a guest said.
type answer struct {
	status int
	body   []byte
}

// do sends a request and reads the answer, of whose body most bytes count; a longer one is an error. After an error the
// connection is of no more use.
func (g *guestConn) do(req *http.Request, most int64) (answer, error) {
	ctx := req.Context()
	stop := context.AfterFunc(ctx, func() { _ = g.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	a, err := g.exchange(req, most)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	g.used = g.used || err == nil
	return a, err
}

func (g *guestConn) exchange(req *http.Request, most int64) (answer, error) {
	g.limited.N = maxGuestHead + most
	if err := req.Write(g.conn); err != nil {
		return answer{}, err
	}
	resp, err := http.ReadResponse(g.reader, req)
	if err != nil {
		return answer{}, err
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	_ = resp.Body.Close() // read to its end, or the connection is given up
	switch {
	case err != nil:
		return answer{}, err
	case int64(len(body)) > most:
		return answer{}, fmt.Errorf("answer of more than %d bytes", most)
	case resp.Close:
		return answer{status: resp.StatusCode, body: body}, g.conn.Close()
	}
	return answer{status: resp.StatusCode, body: body}, nil
}

// guestAddr is where the agent inside a sandbox listens.
func (a *Agent) guestAddr(n *journal.Network) string {
	return netip.AddrPortFrom(n.GuestAddr, a.cfg.GuestPort).String()
}

// connectGuest opens a connection to the agent inside.
func (a *Agent) connectGuest(ctx context.Context, in *instance) (*guestConn, error) {
	r := in.record()
	c, err := a.dial(ctx, "tcp", a.guestAddr(&r.Network))
	if err != nil {
		return nil, err
	}
	return newGuestConn(c), nil
}

// guestRequest makes a request to the agent inside.
func guestRequest(ctx context.Context, method, path, token string, body []byte) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://sandbox"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make request %s %s: %w", method, path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		req.Header.Set("X-Access-Token", token)
	}
	return req, nil
}

// awaitGuest waits until the agent inside answers, and returns the connection on which it did.
func (a *Agent) awaitGuest(ctx context.Context, in *instance) (*guestConn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, a.cfg.GuestTimeout, errSilent)
	defer cancel()
	var last error
	for try := 0; ; try++ {
		g, err := a.tryGuest(ctx, in, try)
		if err == nil {
			return g, nil
		}
		if ctx.Err() == nil {
			last = err
		}
		// 1 ms, 1.5 ms and so on up to 20 ms: a guest takes 20 to 70 ms, and each try costs it little.
		if pause(ctx, min(20*time.Millisecond, time.Millisecond+time.Duration(try)*time.Millisecond/2)) {
			continue
		}
		cause := context.Cause(ctx)
		if errors.Is(cause, errSilent) {
			return nil, sandbox.Unavailablef("sandbox %s: the agent inside did not answer within %v (last: %v)", in.id, a.cfg.GuestTimeout, last)
		}
		return nil, fmt.Errorf("wait for the agent inside sandbox %s: %w", in.id, cause)
	}
}

var errSilent = errors.New("the guest did not answer")

// tryGuest asks once whether the agent inside is there. A lost SYN would be sent again after a second only, so the first
// tries are short; on a busy machine the later ones give it more time.
func (a *Agent) tryGuest(ctx context.Context, in *instance, try int) (*guestConn, error) {
	ctx, cancel := context.WithTimeout(ctx, min(2*time.Second, 50*time.Millisecond<<min(try/4, 6)))
	defer cancel()
	g, err := a.connectGuest(ctx, in)
	if err != nil {
		return nil, err
	}
	if err := checkHealth(ctx, g); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

func checkHealth(ctx context.Context, g *guestConn) error {
	req, err := guestRequest(ctx, http.MethodGet, "/health", "", nil)
	if err != nil {
		return err
	}
	ans, err := g.do(req, maxGuestText)
	if err == nil && ans.status/100 != 2 {
		err = fmt.Errorf("GET /health: status %d", ans.status)
	}
	return err
}

// pause waits, and reports false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// initBody is the body of POST /init.
type initBody struct {
	AccessToken    string            `json:"accessToken,omitempty"`
	EnvVars        map[string]string `json:"envVars,omitempty"`
	DefaultUser    string            `json:"defaultUser,omitempty"`
	DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`
	Timestamp      time.Time         `json:"timestamp"`
	Hostname       string            `json:"hostname"`
	Resolvers      []netip.Addr      `json:"resolvers,omitempty"`
	SandboxID      string            `json:"sandboxId"`
	TemplateID     string            `json:"templateId"`
}

// settingsFor returns what the agent inside is told, and the token that it demands for that.
func (a *Agent) settingsFor(r *journal.Record) (b initBody, known string, err error) {
	b = initBody{Timestamp: now(), Hostname: string(r.ID), Resolvers: a.cfg.Resolvers, SandboxID: string(r.ID), TemplateID: string(r.TemplateID)}
	again := r.State == sandbox.StateResuming || r.State == sandbox.StateMigrating
	if !again || !stands(r) && r.PausedKind != sandbox.CheckpointMemory { // else it knows them
		b.EnvVars, b.DefaultUser, b.DefaultWorkdir = r.Guest.Env, cmp.Or(r.Guest.User, "user"), r.Guest.WorkDir
		if b.DefaultWorkdir == "" {
			b.DefaultWorkdir = homeOf(b.DefaultUser)
		}
	}
	if r.Secure {
		if b.AccessToken, err = a.token(r.ID); err != nil {
			return b, "", err
		}
	}
	known = b.AccessToken
	if r.TokenOf != "" {
		known, err = a.token(r.TokenOf)
	}
	return b, known, err
}

// homeOf returns where a user's home usually is.
func homeOf(user string) string {
	if user == "root" {
		return "/root"
	}
	return "/home/" + user
}

// initGuest tells the agent inside whose sandbox it is in, as the record says. A kept connection that has gone stale is
// replaced once.
func (a *Agent) initGuest(ctx context.Context, in *instance, g *guestConn) error {
	defer func() { g.close() }()
	r := in.record()
	b, known, err := a.settingsFor(&r)
	if err != nil {
		return err
	}
	body, err := json.Marshal(b) //nolint:gosec // the token is for the agent inside
	if err != nil {
		return fmt.Errorf("encode settings of sandbox %s: %w", in.id, err)
	}
	for {
		if g == nil {
			if g, err = a.connectGuest(ctx, in); err != nil {
				return fmt.Errorf("connect to the agent inside sandbox %s: %w: %w", in.id, sandbox.ErrUnavailable, err)
			}
		}
		stale := g.used
		err = postInit(ctx, g, known, body)
		if err == nil || !stale || ctx.Err() != nil || errors.Is(err, sandbox.ErrUnavailable) {
			break
		}
		g.close()
		g = nil
	}
	if err != nil {
		return fmt.Errorf("set up sandbox %s: %w", in.id, err)
	}
	return nil
}

func postInit(ctx context.Context, g *guestConn, token string, body []byte) error {
	req, err := guestRequest(ctx, http.MethodPost, "/init", token, body)
	if err != nil {
		return err
	}
	ans, err := g.do(req, maxGuestText)
	switch {
	case err != nil:
		return err
	case ans.status == http.StatusBadRequest:
		return sandbox.Invalidf("the agent inside refused the settings: %s", guestText(ans.body))
	case ans.status/100 != 2:
		return sandbox.Unavailablef("the agent inside answered with status %d: %s", ans.status, guestText(ans.body))
	}
	return nil
}

// guestText is the message in an error of the agent inside, made safe for a log.
func guestText(body []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &e) != nil || e.Message == "" {
		e.Message = string(body)
	}
	return fmt.Sprintf("%.200q", e.Message)
}

// guestLogs reads the log of the agent inside.
func (a *Agent) guestLogs(ctx context.Context, in *instance, since time.Time) ([]logEntry, error) {
	token := ""
	if in.record().Secure {
		var err error
		if token, err = a.token(in.id); err != nil {
			return nil, err
		}
	}
	g, err := a.connectGuest(ctx, in)
	if err != nil {
		return nil, err
	}
	defer g.close()
	path := "/logs"
	if !since.IsZero() {
		path += "?since=" + url.QueryEscape(since.UTC().Format(time.RFC3339Nano))
	}
	req, err := guestRequest(ctx, http.MethodGet, path, token, nil)
	if err != nil {
		return nil, err
	}
	ans, err := g.do(req, maxGuestLogs)
	if err != nil {
		return nil, err
	}
	if ans.status != http.StatusOK {
		return nil, fmt.Errorf("GET /logs: status %d: %s", ans.status, guestText(ans.body))
	}
	return parseGuestLogs(ans.body)
}

// token returns the access token of a sandbox.
func (a *Agent) token(id sandbox.ID) (string, error) {
	secret := a.secret.Load()
	if secret == nil {
		return "", sandbox.Unavailablef("node %s is not registered with a server yet", a.node)
	}
	return sandbox.AccessToken(*secret, id), nil
}
