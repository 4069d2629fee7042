package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// openGate is a port by which members come in that is open.
type openGate struct{}

func (openGate) Open(context.Context) error { return nil }
func (openGate) Servers() []string          { return []string{"192.0.2.1:3003"} }
func (openGate) Drop(sandbox.Member)        {}

// newTokenWorld is a daemon that machines can join.
func newTokenWorld(t *testing.T) *world {
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
	w := &world{t: t, in: strings.NewReader("")}
	w.cluster = apitest.NewCluster(t, func(cfg *control.Config) {
		cfg.Members, cfg.Tokens, cfg.Authority, cfg.Gate = st, st, authority, openGate{}
	})
	url, key := w.cluster.Serve(t)
	w.env = []string{"E2B_API_URL=" + url, "E2B_API_KEY=" + key, "CLOISTER_DATA_DIR=" + t.TempDir()}
	return w
}

// join uses the command line that `token create` printed.
func (w *world) join(line, id, name string) error {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		w.t.Fatal(err)
	}
	_, text, _ := strings.Cut(line, "--token ")
	_, err = w.cluster.Control.Join(w.t.Context(), &clusterv1.JoinRequest{
		Token: strings.Fields(text)[0], Role: clusterv1.Role_ROLE_NODE, Id: id, Name: name, CertificateRequest: csr,
	})
	return err
}

func TestToken(t *testing.T) {
	w := newTokenWorld(t)
	r := w.do("token", "create")
	line := strings.TrimSpace(r.out)
	if r.code != 0 || !strings.HasPrefix(line, "cloister join 192.0.2.1:3003 --token v1.") || strings.Contains(line, "--role") ||
		!strings.Contains(r.err, "it becomes a node. The token is good for one machine until") {
		t.Fatalf("%+v", r)
	}
	proxy := w.do("token", "create", "--role", "proxy", "--uses", "0", "--ttl", "30m")
	if !strings.HasSuffix(proxy.out, " --role proxy\n") || !strings.Contains(proxy.err, "any number of machines") {
		t.Errorf("%+v", proxy)
	}
	if err := w.join(line, "bbbbbb", "second"); err != nil {
		t.Fatal(err)
	}
	var all []client.Token
	if err := json.Unmarshal([]byte(w.must("token", "ls", "-o", "json")), &all); err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	table := strings.Split(strings.TrimSpace(w.must("token", "ls")), "\n")
	wants := []string{
		"ID ROLE STATE USED LAST USED BY EXPIRES CREATED",
		all[0].ID + " node used 1/1 second - 0s ago",
		all[1].ID + " proxy valid 0 - in 29m59s 0s ago",
	}
	for i, want := range wants {
		if got := strings.Join(strings.Fields(table[i]), " "); !sameButTimes(got, want) {
			t.Errorf("line %d: %q, want %q", i, got, want)
		}
	}
	if out := w.must("token", "ls", "-o", "json"); strings.Contains(out, line[len(line)-20:]) || strings.Contains(out, "hash") {
		t.Errorf("a list shows the secret: %s", out)
	}
	w.must("token", "revoke", all[1].ID)
	if out := w.must("token", "ls"); !strings.Contains(out, "revoked") {
		t.Error(out)
	}
	if out := w.must("__complete", "token", "revoke", ""); strings.Contains(out, all[0].ID) {
		t.Errorf("a token that is worth nothing is offered to be revoked: %s", out)
	}
}

// sameButTimes compares all words but those that tell seconds.
func sameButTimes(got, want string) bool {
	a, b := strings.Fields(got), strings.Fields(want)
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] && !strings.HasSuffix(b[i], "s") {
			return false
		}
	}
	return true
}

func TestTokenUsage(t *testing.T) {
	w := newTokenWorld(t)
	for args, want := range map[string]string{
		"token create --role king":            "want node or proxy",
		"token create --role proxy --replace": "a proxy takes nobody's place",
		"token create --ttl 1ns":              "want 1s to 720h",
		"token create --ttl 721h":             "ttl 721h0m0s",
		"token create --uses -1":              "uses -1",
		"token create --uses 99999":           "0 for any number",
		"token create here":                   "no arguments",
		"token revoke":                        "one token id",
	} {
		if r := w.do(strings.Fields(args)...); r.code != exitUsage || !strings.Contains(r.err, want) || r.out != "" {
			t.Errorf("%s: %+v", args, r)
		}
	}
	if r := w.do("token", "create", "--role", "server"); r.code != exitFailure || !strings.Contains(r.err, "a cluster has one server") {
		t.Errorf("%+v", r)
	}
	if r := w.do("token", "revoke", "nope"); r.code != exitNotFound {
		t.Errorf("%+v", r)
	}
	// A daemon that has no port for others says so.
	if r := newWorld(t).do("token", "create"); r.code != exitFailure || !strings.Contains(r.err, "nobody can join it") {
		t.Errorf("%+v", r)
	}
}
