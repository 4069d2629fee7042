package api_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// openGate is a port by which members come in that is open.
type openGate struct{}

func (openGate) Open(context.Context) error { return nil }
func (openGate) Servers() []string          { return []string{"192.0.2.1:3003"} }
func (openGate) Drop(sandbox.Member)        {}

func TestTokenRoutes(t *testing.T) {
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	}()
	authority, err := auth.NewAuthority("cluster")
	if err != nil {
		t.Fatal(err)
	}
	cluster := apitest.NewCluster(t, func(cfg *control.Config) {
		cfg.Members, cfg.Tokens, cfg.Authority, cfg.Gate = st, st, authority, openGate{}
	})
	c := &caller{handler: cluster.Handler(), key: cluster.Key(t)}
	made := decode[client.CreatedToken](t, c.do("POST", "/v1/tokens", `{"role":"proxy","ttl_seconds":60,"uses":0}`))
	if made.Role != "proxy" || made.Uses != 0 || made.State != "valid" || !strings.HasPrefix(made.Text, "v1."+authority.Fingerprint()+"."+made.ID) ||
		made.Servers[0] != "192.0.2.1:3003" {
		t.Errorf("%+v", made)
	}
	for _, tt := range []struct {
		method, target, body string
		status               int
		want                 string
	}{
		{"POST", "/v1/tokens", `{}`, 201, `"role":"node","state":"valid","uses":1,"used":0`},
		{"POST", "/v1/tokens", `{"ttl_seconds":-1}`, 400, "ttl -1s"},
		{"POST", "/v1/tokens", `{"ttl_seconds":9223372036854775807}`, 400, "720h"},
		{"POST", "/v1/tokens", `{"ttl_seconds":-9223372036854775808}`, 400, "want 1s"},
		{"POST", "/v1/tokens", `{"uses":-1}`, 400, "uses -1"},
		{"POST", "/v1/tokens", `{"role":"king"}`, 400, "node or proxy"},
		{"POST", "/v1/tokens", `{"role":"server"}`, 501, "one server"},
		{"GET", "/v1/tokens", "", 200, `"used_by":[]`},
		{"DELETE", "/v1/tokens/" + made.ID, "", 204, ""},
		{"GET", "/v1/tokens", "", 200, `"revoked_at":"`},
		{"DELETE", "/v1/tokens/nope", "", 404, "does not exist"},
		{"GET", "/v1/members", "", 200, "[]"},
	} {
		w := c.do(tt.method, tt.target, tt.body)
		if w.Code != tt.status || !strings.Contains(w.Body.String(), tt.want) {
			t.Errorf("%s %s %s: %d %s\nwant %d with %s", tt.method, tt.target, tt.body, w.Code, w.Body, tt.status, tt.want)
		}
		if tt.method == "GET" && strings.Contains(w.Body.String(), made.Text[len(made.Text)-20:]) {
			t.Errorf("%s shows the secret", tt.target)
		}
	}
	nobody := &caller{handler: c.handler}
	for _, at := range []string{"/v1/tokens", "/v1/members"} {
		if w := nobody.do("GET", at, ""); w.Code != 401 {
			t.Errorf("%s without a key: %d", at, w.Code)
		}
	}
}
