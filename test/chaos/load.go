package chaos

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/test/harness"
)

const (
	// tagKey is the metadata by which a sandbox is known whose create was not answered.
	tagKey = "chaos"
	// bound is how long any request may take: longer than every deadline of the product, and than any fault.
	bound = 75 * time.Second
	// longLife is longer than any run, and briefLife shorter than a round.
	longLife, briefLife = time.Hour, 10 * time.Second
	// file is what a sandbox keeps its numbers in.
	file = "/tmp/numbers"
	// frontPort is the proxy's.
	guestPort, frontPort = 49983, "3002"
)

// errHang says that a request was neither answered nor failed.
var errHang = errors.New("neither an answer nor an error in time")

// user is a client of the cluster: its API at the server, its sandboxes by way of the proxy.
type user struct {
	api   *client.Client
	proxy *harness.Machine
	http  *http.Client
	// memory is what each sandbox asks for, in bytes: a share of a node, so that admission has something to refuse.
	memory int64
}

func newUser(c *harness.Cluster, memory int64) *user {
	u := &user{api: c.Client(), proxy: c.Proxies[0], memory: memory}
	u.http = u.proxy.HTTP()
	return u
}

func (u *user) close() {
	u.api.Close()
	u.http.CloseIdleConnections()
}

// do carries out one operation of a slot and notes in the ledger what that promises.
func (u *user) do(ctx context.Context, l *Ledger, slot int, verb Verb) (Verb, Box, error) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	b, ok := l.Get(slot)
	var err error
	switch {
	case !ok:
		verb = Create
		b, err = u.create(ctx, l, slot)
	case verb == End || b.Belief == Doomed:
		verb = End
		err = u.kill(ctx, l, slot, b)
	case verb == Look:
		err = u.look(ctx, l, slot, b)
	case verb == Toggle || b.Belief == Unsure:
		verb = Toggle
		err = u.toggle(ctx, l, slot, b)
	case b.Belief == Paused:
		verb = Rest
	case verb == Write:
		err = u.write(ctx, l, slot, b)
	default:
		err = u.read(ctx, b)
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("%w: %w", errHang, err)
	}
	return verb, b, err
}

func (u *user) create(ctx context.Context, l *Ledger, slot int) (Box, error) {
	tag, life, asked := l.Tag(slot), longLife, time.Now()
	if brief(slot) {
		life = briefLife
	}
	s, err := u.api.CreateSandbox(ctx, client.CreateSandbox{
		Metadata: map[string]string{tagKey: tag}, TimeoutSeconds: int64(life / time.Second), Resources: client.Resources{MemoryBytes: u.memory},
		AutoPause: pauses(slot),
	})
	if err != nil {
		return Box{}, fmt.Errorf("create: %w", err)
	}
	b := Box{ID: s.ID, Tag: tag, Token: s.AccessToken, Belief: Running}
	if life == briefLife {
		b.Ends, b.EndsBy, b.Pauses = asked.Add(life), time.Now().Add(life), pauses(slot)
	}
	l.Set(slot, b)
	return b, nil
}

// errEarly says that a sandbox has ended before its time.
var errEarly = errors.New("ended before its time")

// look sees whether a sandbox of a brief life has ended.
func (u *user) look(ctx context.Context, l *Ledger, slot int, b Box) error {
	began := time.Now() // what is answered may have been so since then
	s, err := u.api.GetSandbox(ctx, b.ID)
	ended := client.IsNotFound(err) || err == nil && sandbox.State(s.State).Ended()
	state := sandbox.State(s.State)
	switch {
	case ended && state == sandbox.StateLost && !b.mayEnd(began): // its node may come back with it
		return nil
	case state == sandbox.StateLost || b.Pauses && state == sandbox.StatePaused && b.mayEnd(began):
		return u.kill(ctx, l, slot, b)
	case ended && b.mayEnd(began):
		l.Drop(slot, true)
		return nil
	case ended, b.Pauses && state == sandbox.StatePaused:
		return errors.Join(fmt.Errorf("%w: by %s: %s %s", errEarly, b.Ends.Sub(began), s.State, s.Reason), err)
	}
	return err
}

func (u *user) kill(ctx context.Context, l *Ledger, slot int, b Box) error {
	b.Belief = Doomed
	l.Set(slot, b)
	err := u.api.KillSandbox(ctx, b.ID)
	if err == nil || client.IsNotFound(err) { // it may be the second time
		l.Drop(slot, true)
		return nil
	}
	return err
}

func (u *user) toggle(ctx context.Context, l *Ledger, slot int, b Box) error {
	was := b.Belief
	b.Belief = Unsure
	l.Set(slot, b)
	var err error
	if was == Running {
		_, err = u.api.PauseSandbox(ctx, b.ID, "")
		b.Belief = Paused
	} else {
		_, err = u.api.ResumeSandbox(ctx, b.ID, client.ResumeSandbox{TimeoutSeconds: int64(longLife / time.Second)})
		b.Belief = Running
	}
	if err == nil {
		l.Set(slot, b)
	}
	return err
}

func (u *user) write(ctx context.Context, l *Ledger, slot int, b Box) error {
	b.Tried++
	l.Set(slot, b)
	err := u.run(ctx, b, "echo "+strconv.Itoa(b.Tried)+" >> "+file)
	if err == nil {
		b.Written = append(slices.Clip(b.Written), b.Tried)
		l.Set(slot, b)
	}
	return err
}

// errContent says that a sandbox does not hold what was written to it.
var errContent = errors.New("not what was written")

// read compares a sandbox's file with what was written to it.
func (u *user) read(ctx context.Context, b Box) error {
	text, err := u.fetch(ctx, b)
	if err != nil {
		return err
	}
	if lost, strange := b.missing(text); len(lost)+len(strange) > 0 {
		return fmt.Errorf("%w: lacks %v, has %q beside, of %d", errContent, lost, strange, b.Tried)
	}
	return nil
}

// RoundTrip adds what a request to the agent inside a sandbox needs.
func (g guest) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("E2b-Sandbox-Id", g.box.ID)
	r.Header.Set("E2b-Sandbox-Port", strconv.Itoa(guestPort))
	r.Header.Set("X-Access-Token", g.box.Token)
	r.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("root:")))
	return g.next.RoundTrip(r)
}

// guest is the way to the agent inside a sandbox.
type guest struct {
	box  Box
	next http.RoundTripper
}

const frontURL = "http://127.0.0.1:" + frontPort

// run runs a command in a sandbox as the E2B packages do.
func (u *user) run(ctx context.Context, b Box, script string) error {
	hc := &http.Client{Transport: guest{b, u.http.Transport}}
	stream, err := processconnect.NewProcessClient(hc, frontURL).Start(ctx, &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}},
	})
	if err != nil {
		return fmt.Errorf("start a command: %w", err)
	}
	defer func() { _ = stream.Close() }() // read to its end
	for stream.Receive() {
		if end := stream.Msg().GetEvent().GetEnd(); end != nil && end.GetExited() && end.GetExitCode() == 0 {
			return nil
		} else if end != nil {
			return fmt.Errorf("the command ended with %s", end.GetStatus())
		}
	}
	if err := stream.Err(); err != nil {
		return fmt.Errorf("follow a command: %w", err)
	}
	return errors.New("the command's stream ended without its end")
}

// fetch returns a sandbox's file.
func (u *user) fetch(ctx context.Context, b Box) (string, error) {
	if b.Tried == 0 {
		code, err := u.health(ctx, b)
		if err == nil && code != http.StatusNoContent {
			err = fmt.Errorf("health: %d", code)
		}
		return "", err
	}
	code, body, err := u.get(ctx, b, "/files?username=root&path="+url.QueryEscape(file))
	switch {
	case err != nil:
		return "", err
	case code == http.StatusNotFound && bytes.Contains(body, []byte(file)): // every write may have failed
		return "", nil
	case code != http.StatusOK:
		return "", fmt.Errorf("read %s: %d: %.200s", file, code, body)
	}
	return string(body), nil
}

func (u *user) health(ctx context.Context, b Box) (int, error) {
	code, _, err := u.get(ctx, b, "/health")
	return code, err
}

// unknown reports whether the proxy says that there is no such sandbox, or that it has ended.
func (u *user) unknown(ctx context.Context, b Box) (bool, error) {
	_, body, err := u.get(ctx, b, "/health")
	return bytes.Contains(body, []byte("not found")) || bytes.Contains(body, []byte("is not running")), err
}

func (u *user) get(ctx context.Context, b Box, path string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, frontURL+path, http.NoBody)
	if err != nil {
		return 0, nil, fmt.Errorf("make a request: %w", err)
	}
	resp, err := guest{b, u.http.Transport}.RoundTrip(req)
	if err != nil {
		return 0, nil, fmt.Errorf("get %s: %w", path, err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, nil, fmt.Errorf("get %s: %w", path, err)
	}
	return resp.StatusCode, body, nil
}

// event is one line of a run's time line.
type event struct {
	Time  time.Time     `json:"time"`
	Round int           `json:"round"`
	What  string        `json:"what"`
	Slot  *int          `json:"slot,omitempty"`
	ID    string        `json:"sandbox_id,omitempty"`
	Fault *Fault        `json:"fault,omitempty"`
	Drain *client.Drain `json:"drain,omitempty"`
	Took  time.Duration `json:"took,omitempty"`
	Err   string        `json:"err,omitempty"`
}

func (e event) String() string {
	raw, err := json.Marshal(e)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}
