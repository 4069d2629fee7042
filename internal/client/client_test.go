package client_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/api"
	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newClient(t *testing.T) (*apitest.Cluster, *client.Client) {
	t.Helper()
	cluster := apitest.NewCluster(t, nil)
	url, key := cluster.Serve(t)
	c := client.New(url+"/", key)
	t.Cleanup(c.Close)
	return cluster, c
}

func TestSandboxes(t *testing.T) {
	_, c := newClient(t)
	ctx := t.Context()
	box, err := c.CreateSandbox(ctx, client.CreateSandbox{Metadata: map[string]string{"a b": "c&d=e"}, TimeoutSeconds: 60})
	if err != nil || box.State != "running" || len(box.AccessToken) != 64 || box.Template != "base" {
		t.Fatalf("%+v, %v", box, err)
	}
	if got, err := c.GetSandbox(ctx, box.ID); err != nil || got.AccessToken != box.AccessToken {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := c.SetTimeout(ctx, box.ID, client.SetTimeout{TimeoutSeconds: -1}); err != nil || !got.EndAt.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
	if logs, err := c.Logs(ctx, box.ID, box.StartedAt, 2); err != nil || len(logs) != 2 {
		t.Errorf("%+v, %v", logs, err)
	}
	if samples, err := c.Metrics(ctx, box.ID, time.Time{}, time.Now()); err != nil || len(samples) != 2 {
		t.Errorf("%+v, %v", samples, err)
	}
	for range 4 {
		if _, err := c.CreateSandbox(ctx, client.CreateSandbox{}); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	for b, err := range c.AllSandboxes(ctx, client.ListSandboxes{Limit: 2, States: []string{"running", "failed"}}) {
		if err != nil || b.ID == "" {
			t.Fatal(err)
		}
		seen++
	}
	if seen != 5 {
		t.Errorf("saw %d", seen)
	}
	found, next, err := c.Sandboxes(ctx, client.ListSandboxes{Metadata: map[string]string{"a b": "c&d=e"}, Template: "base"})
	if err != nil || len(found) != 1 || found[0].ID != box.ID || next != "" {
		t.Errorf("%+v, %q, %v", found, next, err)
	}
	for _, err := range c.AllSandboxes(ctx, client.ListSandboxes{States: []string{"odd"}}) {
		if !client.IsInvalid(err) {
			t.Error(err)
		}
	}
	if err := c.KillSandbox(ctx, box.ID); err != nil {
		t.Error(err)
	}
	if err := c.KillSandbox(ctx, box.ID); !client.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := c.GetSandbox(ctx, "../../keys"); !client.IsNotFound(err) {
		t.Error(err)
	}
}

func TestClusterKeysAndEvents(t *testing.T) {
	_, c := newClient(t)
	ctx := t.Context()
	if s, err := c.Status(ctx); err != nil || !s.Ready || s.Nodes["ready"] != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if n, err := c.Nodes(ctx); err != nil || len(n) != 1 || n[0].Name != "node-aaaaaa" {
		t.Errorf("%+v, %v", n, err)
	}
	if n, err := c.Node(ctx, "node-aaaaaa"); err != nil || n.ID != "aaaaaa" {
		t.Errorf("%+v, %v", n, err)
	}
	k, err := c.CreateKey(ctx, "ci")
	if err != nil || !strings.HasPrefix(k.Secret, "e2b_") {
		t.Errorf("%+v, %v", k, err)
	}
	if all, err := c.Keys(ctx); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := c.RevokeKey(ctx, k.ID); err != nil {
		t.Error(err)
	}
	if e, err := c.Events(ctx, client.ListEvents{Type: "key_revoked", Limit: 10}); err != nil || len(e) != 1 {
		t.Errorf("%+v, %v", e, err)
	}
	if d, err := c.OpenAPI(ctx); err != nil || d["openapi"] != "3.1.0" {
		t.Errorf("%v", err)
	}
}

func TestTemplatesAndBuilds(t *testing.T) {
	cluster, c := newClient(t)
	ctx := t.Context()
	tpl, err := c.CreateTemplate(ctx, client.CreateTemplate{Name: "team/tools", Sources: []string{"debian:bookworm"}})
	if err != nil || tpl.TemplateID == "" {
		t.Fatalf("%+v, %v", tpl, err)
	}
	var lines []string
	var last client.Build
	for b, err := range c.FollowBuild(ctx, tpl.BuildID) {
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range b.Entries {
			lines = append(lines, e.Message)
		}
		if len(lines) == 1 {
			cluster.Node.FinishBuild(tpl.BuildID, "sha256:70015", "")
		}
		last = b
	}
	if strings.Join(lines, ",") != "fetching,done" || last.State != client.BuildReady {
		t.Errorf("%v, %+v", lines, last)
	}
	if got, err := c.GetTemplate(ctx, "team/tools"); err != nil || got.Builds[0].ImageDigest != "sha256:70015" {
		t.Errorf("%+v, %v", got, err)
	}
	if all, err := c.ListTemplates(ctx); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := c.DeleteTemplate(ctx, "team/tools"); err != nil {
		t.Error(err)
	}
	for _, err := range c.FollowBuild(ctx, "nope") {
		if !client.IsNotFound(err) {
			t.Error(err)
		}
	}
}

func TestErrors(t *testing.T) {
	cluster, c := newClient(t)
	cluster.Agents.Set("aaaaaa", nil)
	_, err := c.CreateSandbox(t.Context(), client.CreateSandbox{})
	var e *client.APIError
	if !errors.As(err, &e) || !client.IsBusy(err) || e.RetryAfter != time.Second || e.RequestID == "" || !strings.Contains(e.Message, "not connected") {
		t.Errorf("%+v", err)
	}
	if err := cluster.Records.RevokeKey(t.Context(), "key1"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(t.Context()); !client.IsUnauthorized(err) {
		t.Error(err)
	}
	odd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		_, _ = w.Write([]byte("<html>"))
	}))
	defer odd.Close()
	other := client.New(odd.URL, "")
	defer other.Close()
	if _, err := other.Status(t.Context()); !errors.As(err, &e) || e.Code != 502 || e.Message != "the server answered 502 Bad Gateway" {
		t.Errorf("%+v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestLocalSocket(t *testing.T) {
	cluster := apitest.NewCluster(t, nil)
	socket := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(cluster.Handler())
	_ = s.Listener.Close()
	s.Listener = l
	s.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context { return api.WithLocalAdmin(ctx) }
	s.Start()
	defer s.Close()
	c := client.NewLocal(socket)
	defer c.Close()
	if st, err := c.Status(t.Context()); err != nil || !st.Ready {
		t.Errorf("%+v, %v", st, err)
	}
}
