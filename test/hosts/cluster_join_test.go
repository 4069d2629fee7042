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
	c := harness.NewCluster(t, harness.Shape{Nodes: 2, Proxies: 1, Programs: []string{workloadDir}, Flags: hasty()})
	at := net.JoinHostPort(c.Server.Addr.String(), "3003")
	fresh, used := c.Token("node"), c.Token("node")
	late := c.Lab.Machine("late")
	late.Start("join", at, "--token", used.Text)
	t.Run("refused", func(t *testing.T) { joinsRefused(t, c, used.Text, fresh.Text) })
	t.Run("again", func(t *testing.T) {
		late.Kill()
		late.Again() // the token is used up, and is this machine's
		c.Wait("the node that joined twice", func(ctx context.Context) bool { return nodeState(ctx, c, late) == "ready" })
		out, code := try(t, late, "join", at, "--token", c.Token("proxy").Text, "--role", "proxy", "--detach")
		t.Logf("second identity: %s", out)
		if code == 0 || !strings.Contains(out, "leave") {
			t.Errorf("a second identity: exit code %d, %q; want to be told what to do", code, out)
		}
		if out, code = try(t, late, "join", at, "--token", used.Text); code != 0 || !strings.Contains(out, "already node") {
			t.Errorf("joined again while it runs: exit code %d, %q", code, out)
		}
	})
	t.Run("broken off", func(t *testing.T) { brokenOff(t, c, at, fresh.Text) })
	t.Run("without its disk", func(t *testing.T) { withoutDisk(t, c, c.Nodes[1]) })
	t.Run("removed", func(t *testing.T) { removed(t, c, late) })
}

// joinsRefused looks at what a machine is told that may not join: which it was, and what to do.
func joinsRefused(t *testing.T, c *harness.Cluster, used, fresh string) {
	t.Helper()
	revoked, short := c.Token("node"), c.Token("node", "--ttl", "1s")
	if out, code := c.Server.CLI(t.Context(), "token", "revoke", revoked.ID); code != 0 {
		t.Fatalf("revoke: %s", out)
	}
	at, stranger := net.JoinHostPort(c.Server.Addr.String(), "3003"), c.Lab.Machine("stranger")
	otherAuthority, otherID := strings.Split(fresh, "."), strings.Split(fresh, ".")
	otherAuthority[1] = strings.Repeat("0", len(otherAuthority[1]))
	otherID[2] = strings.Repeat("0", len(otherID[2]))
	c.Wait("the end of a token", func(context.Context) bool { return time.Now().After(short.ExpiresAt) })
	for _, tc := range []struct {
		name, at, token, want string
		more                  []string
	}{
		{"other authority", at, strings.Join(otherAuthority, "."), "not of the cluster", nil},
		{"unknown", at, strings.Join(otherID, "."), "does not exist", nil},
		{"used up", at, used, "is used up: it let in node/", nil},
		{"revoked", at, revoked.Text, "was revoked on", nil},
		{"expired", at, short.Text, "expired on", nil},
		{"another role", at, c.Token("proxy").Text, "is for a proxy, not for a node", nil},
		{"not a token", at, "v1.nothing", "token", nil},
		{"another secret", at, fresh[:len(fresh)-4] + "0000", "its secret is wrong", nil},
		{"name of another", at, fresh, "already, which is ready: choose another with --name", []string{"--name", c.Nodes[0].Name}},
		{"server", at, fresh, "a cluster has one server", []string{"--role", "server"}},
		{"nobody there", net.JoinHostPort(c.Server.Addr.String(), "9"), fresh, "nobody answers there", nil},
	} {
		out, code := try(t, stranger, append([]string{"join", tc.at, "--token", tc.token, "--detach"}, tc.more...)...)
		t.Logf("%s: %s", tc.name, out)
		if code == 0 || !strings.Contains(out, tc.want) {
			t.Errorf("%s: exit code %d, %q; want %q in it", tc.name, code, out, tc.want)
		}
	}
	if out, code := c.Server.CLI(t.Context(), "token", "ls"); code != 0 || !strings.Contains(out, "expired") || !strings.Contains(out, "revoked") {
		t.Errorf("token ls: exit code %d\n%s", code, out)
	}
}

// withoutDisk has a machine return that lost everything it had: under its name it is a new node, which the operator or the
// token has to say. What it had paused goes on elsewhere.
func withoutDisk(t *testing.T, c *harness.Cluster, m *harness.Machine) {
	t.Helper()
	paused, before := sandboxOn(t, c, m), mustNode(t, c, m)
	if _, err := c.Client().PauseSandbox(t.Context(), paused.ID, ""); err != nil {
		t.Fatal(err)
	}
	c.Wait("a copy of the paused sandbox", func(context.Context) bool { return guarded(t, c, paused.ID) })
	m.Kill()
	if out, code := m.CLI(t.Context(), "down", "--purge"); code != 0 {
		t.Fatalf("purge: exit code %d, %s", code, out)
	}
	c.Wait("the node to be down", func(ctx context.Context) bool { return nodeState(ctx, c, m) == "down" })
	at := net.JoinHostPort(c.Server.Addr.String(), "3003")
	out, code := try(t, m, "join", at, "--token", c.Token("node").Text, "--name", m.Name, "--detach")
	t.Logf("without its disk: %s", out)
	for _, want := range []string{before.ID, "down since", "cloister node rm " + m.Name, "--replace"} {
		if code == 0 || !strings.Contains(out, want) {
			t.Errorf("the name of a node that is down: exit code %d, %q; want %q in it", code, out, want)
		}
	}
	c.Join(m, "node", "--token", c.Token("node", "--replace").Text)
	c.Wait("the new node of that name", func(ctx context.Context) bool { return nodeState(ctx, c, m) == "ready" })
	if now := mustNode(t, c, m); now.ID == before.ID {
		t.Errorf("the machine without its disk is node %s again", now.ID)
	}
	if _, err := c.Client().Node(t.Context(), before.ID); err == nil {
		t.Error("the old node is still there")
	}
	got, err := c.Client().GetSandbox(t.Context(), paused.ID)
	if err != nil || got.State != "paused" || got.NodeID == before.ID {
		t.Errorf("what was paused there: %s on %s, %v", got.State, got.NodeID, err)
	}
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
	if id, err := auth.OpenIdentity(filepath.Join(m.DataDir(), "identity")); err != nil || mustNode(t, c, m).ID != id.Member().ID {
		t.Errorf("its identity: %v, %v", id.Member(), err)
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
