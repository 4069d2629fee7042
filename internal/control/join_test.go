package control_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/control"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// gate is the port by which members come in, and who was dropped there.
type gate struct {
	mu      sync.Mutex
	opened  int
	taken   error
	dropped []sandbox.Member
}

func (g *gate) Open(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.opened++
	return g.taken
}

func (*gate) Servers() []string { return []string{"192.0.2.1:3003"} }

func (g *gate) Drop(m sandbox.Member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dropped = append(g.dropped, m)
}

// club is a cluster that machines can join, over a real store and authority.
type club struct {
	*apitest.Cluster
	authority *auth.Authority
	store     *store.Store
	gate      *gate
}

func newClub(t *testing.T) *club {
	t.Helper()
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	authority, err := auth.NewAuthority("cluster")
	if err != nil {
		t.Fatal(err)
	}
	c := &club{authority: authority, store: st, gate: &gate{}}
	c.Cluster = apitest.NewCluster(t, func(cfg *control.Config) {
		cfg.Members, cfg.Tokens, cfg.Authority, cfg.Gate = st, st, authority, c.gate
	})
	return c
}

func (c *club) token(t *testing.T, req control.TokenRequest) string {
	t.Helper()
	made, err := c.Control.CreateToken(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return made.Text
}

// newcomer is a machine that is about to join.
type newcomer struct {
	identity *auth.Identity
	role     clusterv1.Role
	name     string
}

func newNewcomer(t *testing.T, id, name string) *newcomer {
	t.Helper()
	i, err := auth.NewIdentity("", sandbox.Member{Role: sandbox.RoleNode, ID: id})
	if err != nil {
		t.Fatal(err)
	}
	return &newcomer{identity: i, role: clusterv1.Role_ROLE_NODE, name: name}
}

func (n *newcomer) request(t *testing.T, token string) (*clusterv1.JoinRequest, auth.Request) {
	t.Helper()
	r, err := n.identity.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	return &clusterv1.JoinRequest{
		Token: token, Role: n.role, Id: n.identity.Member().ID, Name: n.name, CertificateRequest: r.DER, Version: "v1",
	}, r
}

// join lets n in, and gives it its identity.
func (c *club) join(t *testing.T, n *newcomer, token string) error {
	t.Helper()
	req, r := n.request(t, token)
	resp, err := c.Control.Join(t.Context(), req)
	if err != nil {
		return err
	}
	return n.identity.Save(r, auth.Grant{CertPEM: resp.GetCertificate(), AuthorityPEM: resp.GetAuthority(), Servers: resp.GetServers()})
}

func (c *club) events(t *testing.T, kind string) []control.Event {
	t.Helper()
	all, err := c.Control.Events(t.Context(), control.EventQuery{Type: kind})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestJoin(t *testing.T) {
	c, n := newClub(t), newNewcomer(t, "bbbbbb", "second")
	token := c.token(t, control.TokenRequest{})
	if c.gate.opened != 1 {
		t.Error("the port is not open after the first token")
	}
	lost, _ := n.request(t, token)
	if _, err := c.Control.Join(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	if err := c.join(t, n, token); err != nil { // it never saw the answer, and asks again
		t.Fatal(err)
	}
	if n.identity.ClusterID() != "cluster" || !cmp.Equal(n.identity.Servers(), []string{"192.0.2.1:3003"}) {
		t.Errorf("identity in %s, servers %v", n.identity.ClusterID(), n.identity.Servers())
	}
	if left := time.Until(n.identity.Expires()); left > 24*time.Hour || left < 23*time.Hour {
		t.Errorf("the certificate is good for %s", left)
	}
	members, err := c.Control.ListMembers(t.Context())
	if err != nil || len(members) != 1 || members[0].Name != "second" || members[0].Version != "v1" || len(members[0].KeyFingerprint) != 64 {
		t.Errorf("%+v, %v", members, err)
	}
	events := c.events(t, "member_joined")
	if len(events) != 1 || events[0].NodeID != "bbbbbb" || events[0].Message != "node second joined" || events[0].Fields["member"] != "node/bbbbbb" {
		t.Errorf("%+v", events)
	}
	if c.store.Denied(n.identity.Member(), n.identity.Serial()) {
		t.Error("the member is denied")
	}
}

func TestJoinRefusals(t *testing.T) {
	c := newClub(t)
	zero := 0
	node, proxy := c.token(t, control.TokenRequest{Uses: &zero}), c.token(t, control.TokenRequest{Role: sandbox.RoleProxy})
	if err := c.join(t, newNewcomer(t, "bbbbbb", "second"), node); err != nil {
		t.Fatal(err)
	}
	foreign, err := auth.NewAuthority("cluster")
	if err != nil {
		t.Fatal(err)
	}
	foreignToken, err := foreign.MintToken()
	if err != nil {
		t.Fatal(err)
	}
	unknown, err := c.authority.MintToken()
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		change func(*clusterv1.JoinRequest)
		kind   error
		want   string
	}{
		"no token":           {func(r *clusterv1.JoinRequest) { r.Token = "" }, sandbox.ErrInvalid, "join token is empty"},
		"cut token":          {func(r *clusterv1.JoinRequest) { r.Token = node[:90] }, sandbox.ErrInvalid, "was it cut"},
		"another cluster's":  {func(r *clusterv1.JoinRequest) { r.Token = foreignToken }, sandbox.ErrDenied, "of another cluster"},
		"unknown":            {func(r *clusterv1.JoinRequest) { r.Token = unknown }, sandbox.ErrDenied, "does not exist"},
		"wrong secret":       {func(r *clusterv1.JoinRequest) { r.Token = node[:len(node)-4] + "0000" }, sandbox.ErrDenied, "secret is wrong"},
		"proxy's token":      {func(r *clusterv1.JoinRequest) { r.Token = proxy }, sandbox.ErrDenied, "is for a proxy"},
		"server":             {func(r *clusterv1.JoinRequest) { r.Role = clusterv1.Role_ROLE_SERVER }, sandbox.ErrUnsupported, "a cluster has one server"},
		"no role":            {func(r *clusterv1.JoinRequest) { r.Role = 0 }, sandbox.ErrInvalid, "want node or proxy"},
		"odd id":             {func(r *clusterv1.JoinRequest) { r.Id = "../../" }, sandbox.ErrInvalid, "6 characters"},
		"odd name":           {func(r *clusterv1.JoinRequest) { r.Name = "a b" }, sandbox.ErrInvalid, `name "a b"`},
		"name of a member":   {func(r *clusterv1.JoinRequest) { r.Name = "second" }, sandbox.ErrConflict, "choose another with --name"},
		"name of own node":   {func(r *clusterv1.JoinRequest) { r.Name = "node-aaaaaa" }, sandbox.ErrConflict, "choose another with --name"},
		"id of a member":     {func(r *clusterv1.JoinRequest) { r.Id, r.Name = "bbbbbb", "second" }, sandbox.ErrConflict, "with another key"},
		"long version":       {func(r *clusterv1.JoinRequest) { r.Version = strings.Repeat("v", 65) }, sandbox.ErrInvalid, "version of 65"},
		"no key":             {func(r *clusterv1.JoinRequest) { r.CertificateRequest = nil }, sandbox.ErrInvalid, "certificate request"},
		"id of the own node": {func(r *clusterv1.JoinRequest) { r.Id = "aaaaaa" }, sandbox.ErrConflict, "node aaaaaa is here already"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			req, _ := newNewcomer(t, "cccccc", "third").request(t, node)
			tt.change(req)
			_, err := c.Control.Join(t.Context(), req)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %v with %q", err, tt.kind, tt.want)
			}
		})
	}
	if members, err := c.Control.ListMembers(t.Context()); err != nil || len(members) != 1 {
		t.Errorf("%+v, %v", members, err)
	}
}

// A name that is left out is the id.
func TestJoinWithoutName(t *testing.T) {
	c := newClub(t)
	if err := c.join(t, newNewcomer(t, "bbbbbb", ""), c.token(t, control.TokenRequest{})); err != nil {
		t.Fatal(err)
	}
	if all, err := c.Control.ListMembers(t.Context()); err != nil || all[0].Name != "bbbbbb" {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestNobodyJoins(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	_, err := c.Control.Join(t.Context(), &clusterv1.JoinRequest{})
	_, tokenErr := c.Control.CreateToken(t.Context(), control.TokenRequest{})
	_, renewErr := c.Control.Renew(t.Context(), &clusterv1.RenewRequest{})
	for _, err := range []error{err, tokenErr, renewErr, c.Control.RevokeToken(t.Context(), "x")} {
		if !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%v, want ErrUnsupported", err)
		}
	}
	tokens, err := c.Control.ListTokens(t.Context())
	members, err2 := c.Control.ListMembers(t.Context())
	if err := errors.Join(err, err2); err != nil || len(tokens)+len(members) != 0 {
		t.Errorf("%v, %v, %v", tokens, members, err)
	}
}

func TestTokenRequests(t *testing.T) {
	c := newClub(t)
	number := func(n int) *int { return &n }
	for name, tt := range map[string]struct {
		req  control.TokenRequest
		kind error
	}{
		"all defaults":     {control.TokenRequest{}, nil},
		"shortest":         {control.TokenRequest{TTL: time.Second, Uses: number(1000), Replace: true}, nil},
		"longest":          {control.TokenRequest{TTL: 30 * 24 * time.Hour, Uses: number(0), Role: sandbox.RoleProxy}, nil},
		"too short":        {control.TokenRequest{TTL: time.Second - 1}, sandbox.ErrInvalid},
		"place of a proxy": {control.TokenRequest{Role: sandbox.RoleProxy, Replace: true}, sandbox.ErrInvalid},
		"negative":         {control.TokenRequest{TTL: -time.Hour}, sandbox.ErrInvalid},
		"too long":         {control.TokenRequest{TTL: 30*24*time.Hour + 1}, sandbox.ErrInvalid},
		"negative uses":    {control.TokenRequest{Uses: number(-1)}, sandbox.ErrInvalid},
		"too many uses":    {control.TokenRequest{Uses: number(1001)}, sandbox.ErrInvalid},
		"unknown role":     {control.TokenRequest{Role: "king"}, sandbox.ErrInvalid},
		"another server":   {control.TokenRequest{Role: sandbox.RoleServer}, sandbox.ErrUnsupported},
	} {
		made, err := c.Control.CreateToken(t.Context(), tt.req)
		if !errors.Is(err, tt.kind) {
			t.Errorf("%s: %v, want %v", name, err, tt.kind)
		}
		if err == nil && (made.State != "valid" || made.Text == "" || made.ExpiresAt.Sub(made.CreatedAt) < time.Second) {
			t.Errorf("%s: %+v", name, made)
		}
	}
	c.gate.taken = sandbox.Conflictf("port taken")
	before, err := c.Control.ListTokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.CreateToken(t.Context(), control.TokenRequest{}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("the port is taken: %v", err)
	}
	after, err := c.Control.ListTokens(t.Context())
	if err != nil || len(after) != len(before) || len(before) != 3 {
		t.Errorf("%d tokens before, %d after, %v", len(before), len(after), err)
	}
	if err := c.Control.RevokeToken(t.Context(), after[0].ID); err != nil {
		t.Error(err)
	}
	if err := c.Control.RevokeToken(t.Context(), "nope"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
	if after, err = c.Control.ListTokens(t.Context()); err != nil || after[0].State != "revoked" {
		t.Errorf("%+v, %v", after, err)
	}
	if n := len(c.events(t, "token_created")) + len(c.events(t, "token_revoked")); n != 4 {
		t.Errorf("%d events of tokens", n)
	}
}

func TestRenew(t *testing.T) {
	c, n := newClub(t), newNewcomer(t, "bbbbbb", "second")
	if err := c.join(t, n, c.token(t, control.TokenRequest{})); err != nil {
		t.Fatal(err)
	}
	ctx, before := control.WithMember(t.Context(), n.identity.Member()), n.identity.Serial()
	renew := func() error {
		r, err := n.identity.NewRequest()
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Control.Renew(ctx, &clusterv1.RenewRequest{CertificateRequest: r.DER})
		if err != nil {
			return err
		}
		return n.identity.Save(r, auth.Grant{CertPEM: resp.GetCertificate(), AuthorityPEM: resp.GetAuthority(), Servers: resp.GetServers()})
	}
	if err := renew(); err != nil || n.identity.Serial() == before {
		t.Fatalf("renew: %v", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		ctx  context.Context //nolint:containedctx // says who calls
		der  []byte
		kind error
	}{
		"nobody":   {t.Context(), other, sandbox.ErrDenied},
		"stranger": {control.WithMember(t.Context(), sandbox.Member{Role: sandbox.RoleProxy, ID: "bbbbbb"}), other, sandbox.ErrDenied},
		"junk":     {ctx, []byte("junk"), sandbox.ErrInvalid},
	} {
		if _, err := c.Control.Renew(tt.ctx, &clusterv1.RenewRequest{CertificateRequest: tt.der}); !errors.Is(err, tt.kind) {
			t.Errorf("%s: %v, want %v", name, err, tt.kind)
		}
	}
	if _, err := c.Control.Leave(ctx, &clusterv1.LeaveRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := renew(); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "no member of the cluster any more") {
		t.Errorf("renewed by one that left: %v", err)
	}
}

func TestLeave(t *testing.T) {
	c, n := newClub(t), newNewcomer(t, "bbbbbb", "second")
	if err := c.join(t, n, c.token(t, control.TokenRequest{})); err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Control.Run(running) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	who := n.identity.Member()
	ctx := control.WithMember(t.Context(), who)
	node := apitest.NewNode("bbbbbb")
	c.Join(t, node)
	c.Agents.Set("aaaaaa", nil) // so that sandboxes go to the newcomer
	mustCreate(t, c.Cluster, minute())
	if _, err := c.Control.Leave(ctx, &clusterv1.LeaveRequest{}); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "sandbox") {
		t.Fatalf("left with a sandbox: %v", err)
	}
	if c.store.Denied(who, n.identity.Serial()) {
		t.Error("denied although it did not leave")
	}
	if _, err := c.Control.Leave(ctx, &clusterv1.LeaveRequest{Force: true}); err != nil {
		t.Fatal(err)
	}
	if !c.store.Denied(who, n.identity.Serial()) {
		t.Error("not denied after it left")
	}
	if events := c.events(t, "member_left"); len(events) != 1 || events[0].Message != "node second left" {
		t.Errorf("%+v", events)
	}
	if _, err := c.Control.Register(ctx, &nodev1.RegisterRequest{NodeId: "bbbbbb"}); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("it came back without joining: %v", err)
	}
	if _, err := c.Control.GetNode(t.Context(), "bbbbbb"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("its node is still there: %v", err)
	}
	wait(t, "its connections end", func() bool {
		c.gate.mu.Lock()
		defer c.gate.mu.Unlock()
		return slices.Contains(c.gate.dropped, who)
	})
	// Its name is free for another machine.
	if err := c.join(t, newNewcomer(t, "cccccc", "second"), c.token(t, control.TokenRequest{})); err != nil {
		t.Error(err)
	}
}

func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline, tick := time.After(10*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline:
			t.Fatal("never: " + what)
		case <-tick.C:
		}
	}
}

// A node speaks for itself alone.
func TestNodeSpeaksForItself(t *testing.T) {
	c := newClub(t)
	for _, m := range []sandbox.Member{{Role: sandbox.RoleNode, ID: "bbbbbb"}, {Role: sandbox.RoleProxy, ID: "aaaaaa"}} {
		ctx := control.WithMember(t.Context(), m)
		_, err := c.Control.Register(ctx, &nodev1.RegisterRequest{NodeId: "aaaaaa"})
		_, err2 := c.Control.Report(ctx, &nodev1.ReportRequest{NodeId: "aaaaaa", Epoch: 1})
		if !errors.Is(err, sandbox.ErrDenied) || !errors.Is(err2, sandbox.ErrDenied) {
			t.Errorf("%s as node aaaaaa: %v, %v", m, err, err2)
		}
	}
	ctx := control.WithMember(t.Context(), sandbox.Member{Role: sandbox.RoleNode, ID: "bbbbbb"})
	if _, err := c.Control.Register(ctx, &nodev1.RegisterRequest{NodeId: "bbbbbb"}); err != nil {
		t.Error(err)
	}
}

func TestTemplates(t *testing.T) {
	c := newClub(t)
	now := time.Now().UTC()
	err := c.Records.CreateTemplate(t.Context(), sandbox.Template{
		ID: "other0template0id000", Names: []string{"other"}, Tags: map[string]sandbox.Tag{
			"default": {BuildID: "b1", At: now}, "warm": {BuildID: "b2", At: now}, "next": {BuildID: "b3", At: now}, "away": {BuildID: "b4", At: now},
		},
		Builds: []sandbox.Build{
			{ID: "b1", State: sandbox.BuildReady, ImageDigest: apitest.BaseDigest},
			{ID: "b2", State: sandbox.BuildReady, ImageDigest: apitest.BaseDigest, Checkpoint: sandbox.CheckpointMemory},
			{ID: "b3", State: sandbox.BuildBuilding, ImageDigest: apitest.BaseDigest},
			{ID: "b4", State: sandbox.BuildReady, ImageDigest: "sha256:elsewhere"},
			{ID: "b5", State: sandbox.BuildReady, ImageDigest: apitest.BaseDigest},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := control.WithMember(t.Context(), sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"})
	first, err := c.Control.Templates(ctx, &clusterv1.TemplatesRequest{})
	if err != nil || len(first.GetTemplates()) != 2 || first.GetSame() {
		t.Fatalf("%v, %v", first, err)
	}
	var other sandbox.Template
	if err := json.Unmarshal(first.GetTemplates()[1], &other); err != nil || len(other.Builds) != 1 || other.Builds[0].ID != "b1" || len(other.Tags) != 1 {
		t.Errorf("%+v, %v: want the one build that the node can start from", other, err)
	}
	again, err := c.Control.Templates(ctx, &clusterv1.TemplatesRequest{Version: first.GetVersion()})
	if err != nil || !again.GetSame() || len(again.GetTemplates()) != 0 || again.GetVersion() != first.GetVersion() {
		t.Errorf("%v, %v", again, err)
	}
	if _, err := c.Records.DeleteTemplate(t.Context(), "other0template0id000"); err != nil {
		t.Fatal(err)
	}
	less, err := c.Control.Templates(ctx, &clusterv1.TemplatesRequest{Version: first.GetVersion()})
	if err != nil || less.GetSame() || len(less.GetTemplates()) != 1 {
		t.Errorf("%v, %v", less, err)
	}
	nobody, err := c.Control.Templates(control.WithMember(t.Context(), sandbox.Member{Role: sandbox.RoleNode, ID: "zzzzzz"}), &clusterv1.TemplatesRequest{})
	if err != nil || len(nobody.GetTemplates()) != 0 {
		t.Errorf("a node without images: %v, %v", nobody, err)
	}
	for _, ctx := range []context.Context{t.Context(), control.WithMember(t.Context(), sandbox.Member{Role: sandbox.RoleProxy, ID: "aaaaaa"})} {
		if _, err := c.Control.Templates(ctx, &clusterv1.TemplatesRequest{}); !errors.Is(err, sandbox.ErrDenied) {
			t.Errorf("%v, want ErrDenied", err)
		}
	}
}

// TestReadmit has a member come back whose certificate has ended; one that was removed does not, nor by the certificate of an
// earlier stay.
func TestReadmit(t *testing.T) {
	c, n := newClub(t), newNewcomer(t, "bbbbbb", "second")
	cfg := func(grace time.Duration) func(*control.Config) {
		return func(cfg *control.Config) {
			cfg.Members, cfg.Tokens, cfg.Authority, cfg.Gate = c.store, c.store, c.authority, c.gate
			cfg.CertificateLife, cfg.CertificateGrace = time.Second, grace
		}
	}
	c.Restart(t, cfg(time.Hour))
	if err := c.join(t, n, c.token(t, control.TokenRequest{})); err != nil {
		t.Fatal(err)
	}
	wait(t, "its certificate ends", func() bool { return time.Now().After(n.identity.Expires()) })
	readmit := func() error {
		cert, r, err := n.identity.ReadmitRequest()
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Control.Readmit(t.Context(), &clusterv1.ReadmitRequest{Certificate: cert, CertificateRequest: r.DER})
		if err != nil {
			return err
		}
		return n.identity.Save(r, auth.Grant{CertPEM: resp.GetCertificate(), AuthorityPEM: resp.GetAuthority(), Servers: resp.GetServers()})
	}
	before := n.identity.Serial()
	if err := readmit(); err != nil || n.identity.Serial() == before || !time.Now().Before(n.identity.Expires()) {
		t.Fatalf("readmit: %v, until %s", err, n.identity.Expires())
	}
	wait(t, "the second ends", func() bool { return time.Now().After(n.identity.Expires()) })
	c.Restart(t, cfg(-1))
	if err := readmit(); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "new token") {
		t.Errorf("past the grace: %v", err)
	}
	c.Restart(t, cfg(time.Hour))
	if _, err := c.Control.Leave(control.WithMember(t.Context(), n.identity.Member()), &clusterv1.LeaveRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := readmit(); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "no member of the cluster any more") {
		t.Errorf("removed: %v", err)
	}
	if err := c.store.PruneMembers(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := readmit(); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("removed and forgotten: %v", err)
	}
}
