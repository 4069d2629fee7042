package agent

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem/filesystemconnect"
	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxGuestMessage is the most that one message of a guest may have: its output comes in pieces of 32 KiB.
	maxGuestMessage = 256 << 10
	// maxOutputLine is where a line of output is broken.
	maxOutputLine = 4 << 10
)

// buildGuest speaks to the agent inside a build's sandbox, as the SDKs do. What it answers is hostile.
type buildGuest struct {
	http    *http.Client
	process processconnect.ProcessClient
	files   filesystemconnect.FilesystemClient
	shell   []string // with the arguments before the command
}

func (a *Agent) newBuildGuest(in *instance) *buildGuest {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			r := in.record()
			return a.dial(ctx, "tcp", a.guestAddr(&r.Network))
		},
		DisableCompression: true, MaxResponseHeaderBytes: maxGuestHead, MaxIdleConnsPerHost: 2,
	}
	g := &buildGuest{http: &http.Client{Transport: transport}}
	options := []connect.ClientOption{connect.WithReadMaxBytes(maxGuestMessage), connect.WithAcceptCompression("gzip", nil, nil)}
	g.process = processconnect.NewProcessClient(g.http, "http://sandbox", options...)
	g.files = filesystemconnect.NewFilesystemClient(g.http, "http://sandbox", options...)
	return g
}

func (g *buildGuest) close() { g.http.CloseIdleConnections() }

// command is what runs in a sandbox, with what is in force for it.
type command struct {
	text  string
	guest sandbox.GuestSettings
	user  string // in place of that in force; empty means that
}

// as returns the headers by which a call acts as a user.
func actAs(ctx context.Context, user string) context.Context {
	ctx, info := connect.NewClientContext(ctx)
	info.RequestHeader().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	info.RequestHeader().Set("Keepalive-Ping-Interval", "30")
	return ctx
}

// findShell learns which shell the image has.
func (g *buildGuest) findShell(ctx context.Context) error {
	if g.shell != nil {
		return nil
	}
	_, err := g.files.Stat(actAs(ctx, "root"), &filesystem.StatRequest{Path: "/bin/bash"})
	switch {
	case err == nil:
		g.shell = []string{"/bin/bash", "-l", "-c"}
	case connect.CodeOf(err) == connect.CodeNotFound:
		g.shell = []string{"/bin/sh", "-c"}
	default:
		return guestError(ctx, err)
	}
	return nil
}

// run runs a command and hands on what it writes, whole lines at a time. It returns how the command ended: "exit status 0"
// where it succeeded. The end of ctx's time, but not its cancellation, ends the command.
func (g *buildGuest) run(ctx context.Context, c command, out func(level, line string)) (status string, err error) {
	if err := g.findShell(ctx); err != nil {
		return "", err
	}
	text := c.text
	if path := c.guest.Env["PATH"]; path != "" {
		// Most images' login shells set their own, whatever the image says.
		text = "export PATH='" + strings.ReplaceAll(path, "'", `'\''`) + "'\n" + text
	}
	cfg := &process.ProcessConfig{Cmd: g.shell[0], Args: append(slices.Clip(g.shell[1:]), text), Envs: c.guest.Env}
	if c.guest.WorkDir != "" {
		cfg.Cwd = &c.guest.WorkDir
	}
	user := c.user
	if user == "" {
		user = userOf(&c.guest)
	}
	no := false
	stream, err := g.process.Start(actAs(ctx, user), &process.StartRequest{Process: cfg, Stdin: &no})
	if err != nil {
		return "", guestError(ctx, err)
	}
	defer func() { _ = stream.Close() }() // it was read to its end, or is given up
	stdout, stderr := &lines{level: "info", out: out}, &lines{level: "error", out: out}
	defer func() {
		stdout.flush()
		stderr.flush()
	}()
	for stream.Receive() {
		switch e := stream.Msg().GetEvent(); {
		case e.GetData() != nil:
			stdout.write(e.GetData().GetStdout())
			stderr.write(e.GetData().GetStderr())
		case e.GetEnd() != nil:
			if end := e.GetEnd(); end.GetExitCode() != 0 || !end.GetExited() {
				return clip(end.GetStatus(), 200), nil
			}
			return statusOK, nil
		}
	}
	err = stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return "", guestError(ctx, err)
}

const statusOK = "exit status 0"

// userOf returns who processes run as.
func userOf(g *sandbox.GuestSettings) string {
	if g.User == "" {
		return "user"
	}
	return g.User
}

// guestError gives an error of a call into a guest a kind and bounds.
func guestError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	text := err.Error()
	if coded, ok := errors.AsType[*connect.Error](err); ok {
		text = coded.Message()
	}
	text = clip(text, 500)
	switch connect.CodeOf(err) { //nolint:exhaustive // the rest is the agent's fault
	case connect.CodeInvalidArgument, connect.CodeUnauthenticated, connect.CodeFailedPrecondition, connect.CodeNotFound,
		connect.CodePermissionDenied, connect.CodeAlreadyExists:
		return sandbox.Invalidf("%s", text)
	case connect.CodeResourceExhausted:
		return sandbox.Exhaustedf("%s", text)
	default:
		return sandbox.Unavailablef("the agent inside: %s", text)
	}
}

// makeDir makes a directory that belongs to the user, unless it is there, and reports whether it did.
func (g *buildGuest) makeDir(ctx context.Context, name, user string) (made bool, err error) {
	_, err = g.files.MakeDir(actAs(ctx, user), &filesystem.MakeDirRequest{Path: name})
	switch {
	case err == nil:
		return true, nil
	case connect.CodeOf(err) == connect.CodeAlreadyExists:
		return false, nil
	}
	return false, guestError(ctx, err)
}

// ensureUser makes an account, unless it is there, and reports whether it did.
func (g *buildGuest) ensureUser(ctx context.Context, name string) (made bool, err error) {
	body := fmt.Sprintf(`{"user":%q}`, name) // the name has no characters that JSON and Go quote differently
	answer, err := g.post(ctx, "/accounts", strings.NewReader(body), int64(len(body)))
	if err != nil {
		return false, err
	}
	var said struct {
		Created *bool `json:"created"`
	}
	_ = json.Unmarshal(answer, &said) // what does not say so counts as made: whatever was done is kept
	return said.Created == nil || *said.Created, nil
}

// copyIn unpacks an archive as a COPY step says.
func (g *buildGuest) copyIn(ctx context.Context, q url.Values, archive *os.File) error {
	info, err := archive.Stat()
	if err != nil {
		return err
	}
	_, err = g.post(ctx, "/copy?"+q.Encode(), archive, info.Size())
	return err
}

// post sends a request, and returns the answer of one that succeeded.
func (g *buildGuest) post(ctx context.Context, path string, body io.Reader, size int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://sandbox"+path, io.NopCloser(body))
	if err != nil {
		return nil, fmt.Errorf("make request %s: %w", path, err)
	}
	req.ContentLength = size
	resp, err := g.http.Do(req)
	if err != nil {
		return nil, guestError(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }() // what is left of it is of no use
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxGuestText))
	switch {
	case err != nil:
		return nil, guestError(ctx, err)
	case resp.StatusCode/100 == 2:
		return answer, nil
	case resp.StatusCode == http.StatusInsufficientStorage:
		return nil, sandbox.Exhaustedf("%s", plainText(answer))
	case resp.StatusCode/100 == 4:
		return nil, sandbox.Invalidf("%s", plainText(answer))
	}
	return nil, sandbox.Unavailablef("the agent inside answered with status %d: %s", resp.StatusCode, plainText(answer))
}

// plainText is the message in an error of the agent inside, fit for people.
func plainText(body []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &e) != nil || e.Message == "" {
		e.Message = string(body)
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, clip(e.Message, 500))
}

// lines cuts output into lines for a log.
type lines struct {
	level string
	out   func(level, line string)
	rest  []byte
}

func (l *lines) write(data []byte) {
	for len(data) > 0 {
		line, after, whole := bytes.Cut(data, []byte{'\n'})
		room := maxOutputLine - len(l.rest)
		if len(line) > room {
			line, after, whole = line[:room], data[room:], true
		}
		l.rest = append(l.rest, line...)
		if whole {
			l.flush()
		}
		data = after
	}
}

// flush hands on what there is of a line. Of one that was written over itself, as progress bars are, the last counts.
func (l *lines) flush() {
	text := strings.TrimRight(string(l.rest), "\r \t")
	l.rest = l.rest[:0]
	if i := strings.LastIndexByte(text, '\r'); i >= 0 {
		text = text[i+1:]
	}
	if text = strings.ToValidUTF8(text, "\uFFFD"); strings.TrimSpace(text) != "" {
		l.out(l.level, text)
	}
}
