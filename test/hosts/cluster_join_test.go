package hosts_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/test/harness"
)

// try runs a command in a machine and returns all that it says.
func try(t *testing.T, m *harness.Machine, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	all := append([]string{"-c", `exec "$0" "$@" 2>&1`, harness.Binary(t), "--data-dir", m.DataDir()}, args...)
	return m.Run(ctx, "sh", all...)
}

// TestClusterJoin has machines refused, each for its reason, and others come, return and go.
func TestClusterJoin(t *testing.T) {
	c := harness.NewCluster(t, harness.Shape{Nodes: 2, Proxies: 1, Programs: []string{workloadDir}})
	at := net.JoinHostPort(c.Server.Addr.String(), "3003")
	stranger := c.Lab.Machine("stranger")
	fresh, used, revoked, proxy := c.Token("node"), c.Token("node"), c.Token("node"), c.Token("proxy")
	if out, code := c.Server.CLI(t.Context(), "token", "revoke", revoked.ID); code != 0 {
		t.Fatalf("revoke: %s", out)
	}
	c.Join(c.Lab.Machine("other"), "proxy", "--token", proxy.Text)
	late := c.Lab.Machine("late")
	late.Start("join", at, "--token", used.Text)
	parts := strings.Split(fresh.Text, ".")
	parts[1] = strings.Repeat("0", len(parts[1]))
	for _, tc := range []struct{ name, token, want string }{
		{"other authority", strings.Join(parts, "."), "not of the cluster"},
		{"used up", used.Text, "used"},
		{"revoked", revoked.Text, "revoked"},
		{"another role", c.Token("proxy").Text, "proxy"},
		{"not a token", "v1.nothing", "token"},
		{"another secret", fresh.Text[:len(fresh.Text)-4] + "0000", "token"},
	} {
		out, code := try(t, stranger, "join", at, "--token", tc.token, "--detach")
		t.Logf("%s: %s", tc.name, out)
		if code == 0 || !strings.Contains(out, tc.want) {
			t.Errorf("%s: exit code %d, %q; want %q in it", tc.name, code, out, tc.want)
		}
	}
	t.Run("again", func(t *testing.T) {
		late.Kill()
		late.Again() // the token is used up, and is this machine's
		c.Wait("the node that joined twice", func(ctx context.Context) bool { return nodeState(ctx, c, late) == "ready" })
		out, code := try(t, late, "join", at, "--token", proxy.Text, "--role", "proxy", "--detach")
		t.Logf("second identity: %s", out)
		if code == 0 || !strings.Contains(out, "leave") {
			t.Errorf("a second identity: exit code %d, %q; want to be told what to do", code, out)
		}
	})
	t.Run("broken off", func(t *testing.T) { brokenOff(t, c, at, fresh.Text) })
	t.Run("removed", func(t *testing.T) { removed(t, c, late) })
}

// brokenOff has a machine killed while it joins, which goes on where it was.
func brokenOff(t *testing.T, c *harness.Cluster, at, token string) {
	t.Helper()
	m := c.Lab.Machine("broken")
	for d := 20 * time.Millisecond; d < 200*time.Millisecond; d *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		m.Run(ctx, harness.Binary(t), "--data-dir", m.DataDir(), "join", at, "--token", token, "--node-name", m.Name)
		cancel()
		m.Kill()
	}
	m.Start("join", at, "--token", token)
	c.Wait("the node whose join was killed", func(ctx context.Context) bool { return nodeState(ctx, c, m) == "ready" })
	all, err := c.Client().Nodes(t.Context())
	if err != nil || len(all) != len(c.Nodes)+2 {
		t.Errorf("%d nodes, %v; want %d", len(all), err, len(c.Nodes)+2)
	}
	m.Signal(os.Interrupt)
}

// removed takes a node out, which is refused from then on, also by nodes that it dials directly.
func removed(t *testing.T, c *harness.Cluster, m *harness.Machine) {
	t.Helper()
	id, err := auth.OpenIdentity(filepath.Join(m.DataDir(), "identity"))
	if err != nil {
		t.Fatal(err)
	}
	c.Wait("the other node's address", func(ctx context.Context) bool {
		n, err := c.Node(ctx, c.Nodes[0])
		return err == nil && n.Address != ""
	})
	before := direct(t, m, mustNode(t, c, c.Nodes[0]), id)
	if err := awaitEnd(before, 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a member's connection to a node: %v; want it open", err)
	}
	if out, code := c.Server.CLI(t.Context(), "node", "rm", m.Name, "--force"); code != 0 {
		t.Fatalf("rm: %s", out)
	}
	if err := awaitEnd(before, 10*time.Second); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a removed node's connection to another stays open")
	}
	if err := awaitEnd(direct(t, m, mustNode(t, c, c.Nodes[0]), id), 10*time.Second); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a removed node is let in by another")
	}
	c.Wait("the removed node to be cut off", func(ctx context.Context) bool {
		st, err := m.Client().Status(ctx)
		return err == nil && st.Member != nil && !st.Member.Connected
	})
	if got := nodeState(t.Context(), c, m); got != "" {
		t.Errorf("the removed node is %q", got)
	}
	if out, code := c.Proxies[0].CLI(t.Context(), "leave"); code != 0 {
		t.Errorf("leave: %s", out)
	}
}

// direct connects to a node as another one that has joined.
func direct(t *testing.T, from *harness.Machine, to client.Node, as *auth.Identity) *tls.Conn {
	t.Helper()
	raw, err := from.Dial(t.Context(), "tcp", to.Address)
	if err != nil {
		t.Fatal(err)
	}
	settings := as.ClientTLS(sandbox.Member{Role: sandbox.RoleNode, ID: to.ID})
	settings.NextProtos = []string{"cloister-node/1"}
	conn := tls.Client(raw, settings)
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.HandshakeContext(t.Context()); err != nil { // the node's own refusal comes after it
		t.Logf("handshake: %v", err)
	}
	return conn
}

// awaitEnd returns how a connection ended on which nothing comes; os.ErrDeadlineExceeded where it did not.
func awaitEnd(c *tls.Conn, within time.Duration) error {
	_ = c.NetConn().SetReadDeadline(time.Now().Add(within))
	_, err := c.NetConn().Read(make([]byte, 1))
	for err == nil { // session tickets and alerts
		_, err = c.NetConn().Read(make([]byte, 1024))
	}
	return err
}
