package daemon

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/config"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/gen/cluster/v1/clusterv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// doorman lets machines join a cluster with a real authority, and keeps nothing but what it was asked.
type doorman struct {
	clusterv1connect.UnimplementedJoinServiceHandler

	authority *auth.Authority
	address   string

	mu    sync.Mutex
	asked []*clusterv1.JoinRequest
	// fail is answered after everything was done: the answer that gets lost.
	fail error
}

func newDoorman(t *testing.T) *doorman {
	t.Helper()
	authority, err := auth.NewAuthority("0123456789abcdef0123456789abcdef")
	if err != nil {
		t.Fatal(err)
	}
	identity, err := authority.Issue(sandbox.Member{Role: sandbox.RoleServer, ID: "server"}, time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := &doorman{authority: authority}
	mux := http.NewServeMux()
	mux.Handle(clusterv1connect.NewJoinServiceHandler(d))
	srv := httptest.NewUnstartedServer(mux)
	srv.TLS = identity.JoinTLS("http/1.1")
	srv.StartTLS()
	t.Cleanup(srv.Close)
	d.address = srv.Listener.Addr().String()
	return d
}

// Join makes whoever asks a member.
func (d *doorman) Join(_ context.Context, req *clusterv1.JoinRequest) (*clusterv1.JoinResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, req)
	if d.fail != nil {
		return nil, d.fail
	}
	role := sandbox.RoleNode
	if req.GetRole() == clusterv1.Role_ROLE_PROXY {
		role = sandbox.RoleProxy
	}
	chain, _, err := d.authority.Sign(req.GetCertificateRequest(), sandbox.Member{Role: role, ID: req.GetId()}, time.Hour)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return &clusterv1.JoinResponse{Certificate: chain, Authority: d.authority.CertPEM(), ClusterId: d.authority.ClusterID(), Servers: []string{d.address}}, nil
}

func (d *doorman) failWith(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = err
}

func (d *doorman) requests() []*clusterv1.JoinRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked
}

func (d *doorman) token(t *testing.T) string {
	t.Helper()
	text, err := d.authority.MintToken()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func joinSettings(t *testing.T) *config.Config {
	t.Helper()
	cfg := config.Default()
	cfg.DataDir, cfg.NodeName = filepath.Join(t.TempDir(), "data"), "machine"
	return cfg
}

func TestJoinIsSafeToRepeat(t *testing.T) {
	d, cfg := newDoorman(t), joinSettings(t)
	o := JoinOptions{Server: d.address, Token: d.token(t), Labels: []string{"rack=b"}, Address: "192.0.2.7"}
	first, err := Join(t.Context(), cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	if first.Role != "node" || first.Name != "machine" || first.ClusterID != d.authority.ClusterID() || first.Again {
		t.Errorf("joined: %+v", first)
	}
	again, err := Join(t.Context(), cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	if again.ID != first.ID || !again.Again || len(d.requests()) != 1 {
		t.Errorf("the second time: %+v, after %d requests", again, len(d.requests()))
	}
	kept, err := readChoices(cfg.DataDir)
	if err != nil || kept.Labels["rack"] != "b" || kept.Address != "192.0.2.7" {
		t.Errorf("kept: %+v, %v", kept, err)
	}
	if _, err := joinedAs(cfg, sandbox.RoleNode); err != nil {
		t.Error(err)
	}
	if err := refuseMember(cfg.DataDir); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "cloister leave") {
		t.Errorf("a server on the directory of a node: %v", err)
	}
}

func TestJoinAfterALostAnswer(t *testing.T) {
	d, cfg := newDoorman(t), joinSettings(t)
	d.failWith(connect.NewError(connect.CodeUnavailable, errors.New("cut off")))
	o := JoinOptions{Server: d.address, Token: d.token(t)}
	if _, err := Join(t.Context(), cfg, o); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Fatalf("cut off: %v", err)
	}
	if _, err := joinedAs(cfg, sandbox.RoleNode); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "repeat") {
		t.Errorf("the role of a join that is not done: %v", err)
	}
	d.failWith(nil)
	m, err := Join(t.Context(), cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	all := d.requests()
	if len(all) != 2 || all[0].GetId() != all[1].GetId() || m.ID != all[0].GetId() {
		t.Errorf("requests: %v; joined as %s", all, m.ID)
	}
}

// TestJoinAsSomethingElse begins anew where the first attempt came to nothing, and refuses where it did not.
func TestJoinAsSomethingElse(t *testing.T) {
	d, cfg := newDoorman(t), joinSettings(t)
	d.failWith(connect.NewError(connect.CodePermissionDenied, errors.New("the token is for a proxy")))
	o := JoinOptions{Server: d.address, Token: d.token(t)}
	if _, err := Join(t.Context(), cfg, o); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "for a proxy") {
		t.Fatalf("the wrong token: %v", err)
	}
	d.failWith(nil)
	o.Role = "proxy"
	if m, err := Join(t.Context(), cfg, o); err != nil || m.Role != "proxy" {
		t.Fatalf("as a proxy: %+v, %v", m, err)
	}
	o.Role = "node"
	if _, err := Join(t.Context(), cfg, o); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "cloister leave") {
		t.Errorf("a second role: %v", err)
	}
	other := newDoorman(t)
	o = JoinOptions{Server: other.address, Token: other.token(t), Role: "proxy"}
	if _, err := Join(t.Context(), cfg, o); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "another cluster") {
		t.Errorf("a second cluster: %v", err)
	}
	if len(other.requests()) != 0 {
		t.Error("the second cluster was asked")
	}
}

func TestJoinWhileRunning(t *testing.T) {
	d, cfg := newDoorman(t), joinSettings(t)
	o := JoinOptions{Server: d.address, Token: d.token(t)}
	first, err := Join(t.Context(), cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	held, err := acquire(t.Context(), cfg.DataDir, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer held.release()
	if m, err := Join(t.Context(), cfg, o); err != nil || !m.Running || m.ID != first.ID {
		t.Errorf("joined while it runs: %+v, %v", m, err)
	}
}

func TestJoinRefusals(t *testing.T) {
	d, cfg := newDoorman(t), joinSettings(t)
	stranger := newDoorman(t)
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	for _, tc := range []struct {
		name string
		o    JoinOptions
		kind error
		says string
	}{
		{"no token", JoinOptions{Server: d.address}, sandbox.ErrInvalid, "cloister token create"},
		{"another role", JoinOptions{Server: d.address, Token: d.token(t), Role: "king"}, sandbox.ErrInvalid, "king"},
		{"a server", JoinOptions{Server: d.address, Token: d.token(t), Role: "server"}, sandbox.ErrUnsupported, "one server"},
		{"no address", JoinOptions{Server: "http://x/", Token: d.token(t)}, sandbox.ErrInvalid, "HOST:PORT"},
		{"label", JoinOptions{Server: d.address, Token: d.token(t), Labels: []string{"x"}}, sandbox.ErrInvalid, "KEY=VALUE"},
		{"nobody there", JoinOptions{Server: "127.0.0.1:1", Token: d.token(t)}, sandbox.ErrUnavailable, "nobody answers"},
		{"no TLS", JoinOptions{Server: plain.Listener.Addr().String(), Token: d.token(t)}, sandbox.ErrUnavailable, "3003"},
		{"wrong cluster", JoinOptions{Server: stranger.address, Token: d.token(t)}, sandbox.ErrDenied, "not of the cluster"},
	} {
		if _, err := Join(t.Context(), cfg, tc.o); !errors.Is(err, tc.kind) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v; want %v that says %q", tc.name, err, tc.kind, tc.says)
		}
	}
	if err := os.MkdirAll(filepath.Join(cfg.DataDir, "server"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Join(t.Context(), cfg, JoinOptions{Server: d.address, Token: d.token(t)}); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "--purge") {
		t.Errorf("on a server's directory: %v", err)
	}
}

func TestClusterAddress(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1": "192.0.2.1:3003", "192.0.2.1:9": "192.0.2.1:9", "host": "host:3003", "::1": "[::1]:3003", "[::1]:7": "[::1]:7", "": "", "a/b": "",
	} {
		got, err := clusterAddress(text)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("clusterAddress(%q) = %q, %v; want %q", text, got, err, want)
		}
	}
}

func FuzzClusterAddress(f *testing.F) {
	for _, s := range []string{"host", "192.0.2.1:3003", "[::1]:3003", "a:b:c", "%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := clusterAddress(text); err == nil && !strings.Contains(got, ":") {
			t.Errorf("clusterAddress(%q) = %q", text, got)
		}
	})
}
