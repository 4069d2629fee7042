package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/config"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/gen/cluster/v1/clusterv1connect"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// leaveTimeout bounds the asking of the server, and a link that is made for it.
const leaveTimeout = 20 * time.Second

// leavePath is where the socket of a machine that joined takes the wish to leave: its link is the way to the server.
const leavePath = "/member/leave"

// Leave takes the machine out of its cluster at the server. What the machine keeps stays; Purge removes that. With force
// it also goes when it has sandboxes or when no server answers. Errors: ErrConflict where the machine has not joined, or has
// sandboxes; ErrUnavailable where no server answers.
func Leave(ctx context.Context, cfg *config.Config, force bool) (Joined, error) {
	id, err := openIdentity(cfg.DataDir)
	if errors.Is(err, sandbox.ErrNotFound) {
		if isServer(cfg.DataDir) {
			return Joined{}, sandbox.Conflictf("%s belongs to a server, which cannot leave its own cluster: `cloister down --purge` removes it", cfg.DataDir)
		}
		return Joined{}, sandbox.Conflictf("%s has no identity: this machine is in no cluster", cfg.DataDir)
	}
	if err != nil {
		return Joined{}, err
	}
	kept, err := readChoices(cfg.DataDir)
	if err != nil {
		return Joined{}, err
	}
	out := (&join{identity: id, choices: kept}).joined(true)
	if !id.Joined() {
		return out, nil // the join was never finished: no server knows of it, or forgets it with the token
	}
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	if _, running := HolderOf(cfg.DataDir); running {
		err = leaveThrough(ctx, filepath.Join(cfg.DataDir, "cloister.sock"), force)
	} else {
		err = leaveDirectly(ctx, id, kept, force)
	}
	switch {
	case errors.Is(err, sandbox.ErrDenied), errors.Is(err, sandbox.ErrNotFound):
		return out, nil // it was taken out already
	case errors.Is(err, sandbox.ErrUnavailable) && force:
		return out, nil
	case errors.Is(err, sandbox.ErrUnavailable):
		return out, fmt.Errorf("leave cluster: %w; --force leaves without asking, and `cloister node rm` on the server forgets the machine", err)
	case err != nil:
		return out, fmt.Errorf("leave cluster: %w", err)
	}
	return out, nil
}

// leaveDirectly asks over a link of its own: nothing runs on the machine.
func leaveDirectly(ctx context.Context, id *auth.Identity, kept choices, force bool) error {
	m := &memberRole{identity: id, choices: kept}
	up := make(chan struct{}, 1)
	l := link.New(link.Config{
		Self: id.Member(), Servers: m.servers, TLS: id.ClientTLS, Logger: slog.New(slog.DiscardHandler),
		OnUp: func(string) {
			select {
			case up <- struct{}{}:
			default:
			}
		},
	})
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.Run(ctx) // its end is told by the call that fails
	}()
	defer func() { cancel(); <-ended }()
	select {
	case <-up:
	case <-ctx.Done():
		return sandbox.Unavailablef("no server is reached (%v)", l.Err())
	}
	return askToLeave(ctx, clusterv1connect.NewMemberServiceClient(l.HTTPClient(), link.BaseURL), force)
}

func askToLeave(ctx context.Context, members clusterv1connect.MemberServiceClient, force bool) error {
	_, err := members.Leave(ctx, &clusterv1.LeaveRequest{Force: force})
	if answer, ok := errors.AsType[*connect.Error](err); ok {
		return kindOf(answer)
	}
	return err
}

// leaveThrough has the running role ask.
func leaveThrough(ctx context.Context, socket string, force bool) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://cloister"+leavePath+"?force="+strconv.FormatBool(force), http.NoBody)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return sandbox.Unavailablef("the daemon on this machine does not answer: %v", err)
	}
	defer func() { _ = resp.Body.Close() }()
	var a leaveAnswer
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxLeaveAnswer)).Decode(&a); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return a.err()
}

const maxLeaveAnswer = 64 << 10

// leaveAnswer is an error with its kind, or neither.
type leaveAnswer struct {
	Kind string `json:"kind,omitempty"`
	Text string `json:"text,omitempty"`
}

func leaveKinds() map[string]error {
	return map[string]error{
		"not_found": sandbox.ErrNotFound, "conflict": sandbox.ErrConflict, "unavailable": sandbox.ErrUnavailable, "denied": sandbox.ErrDenied,
	}
}

func (a leaveAnswer) err() error {
	if a.Text == "" {
		return nil
	}
	if kind, ok := leaveKinds()[a.Kind]; ok {
		return &leaveError{text: a.Text, kind: kind}
	}
	return errors.New(a.Text)
}

// leaveError is an error of the running daemon.
type leaveError struct {
	text string
	kind error
}

// Error is its text there.
func (e *leaveError) Error() string { return e.text }

// Unwrap returns its kind.
func (e *leaveError) Unwrap() error { return e.kind }

// serveLeave asks the server over the role's own link.
func (d *daemon) serveLeave(w http.ResponseWriter, r *http.Request) {
	err := askToLeave(r.Context(), d.member.members, r.URL.Query().Get("force") == "true")
	var a leaveAnswer
	if err != nil {
		a.Text = err.Error()
		for name, kind := range leaveKinds() {
			if errors.Is(err, kind) {
				a.Kind = name
			}
		}
	}
	_ = json.NewEncoder(w).Encode(a) // who has gone needs no answer
}
