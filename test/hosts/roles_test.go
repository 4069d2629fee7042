package hosts_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// state returns a sandbox's state as a machine's daemon tells it; "" where it knows none.
func state(ctx context.Context, m *harness.Machine, id string) string {
	s, err := m.Client().GetSandbox(ctx, id)
	if err != nil {
		return ""
	}
	return s.State
}

// TestNodeAlone uses a node through its own socket while no server runs, also after the node itself has started again. What
// happened there appears on the server when that is back.
func TestNodeAlone(t *testing.T) {
	t.Parallel()
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Proxies: 1})
	node, gone := c.Nodes[0], c.Proxies[0]
	left := leaves(t, c, gone)
	before, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	c.Wait("the node's copy of the templates", func(ctx context.Context) bool {
		st, err := node.Client().Status(ctx)
		return err == nil && st.Templates == 1
	})
	known := mustNode(t, c, node)
	c.Server.Signal(os.Interrupt)
	node.Signal(os.Interrupt)
	node.Again()
	if err := awaitEnd(direct(t, gone, known, left), 10*time.Second); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a node that started again without a server lets in who had left")
	}
	c.Wait("the node to know its sandbox", func(ctx context.Context) bool { return state(ctx, node, before.ID) == "running" })
	if st, err := node.Client().Status(t.Context()); err != nil || st.Member == nil || st.Member.Connected || st.Member.Role != "node" {
		t.Errorf("status of a node alone: %+v, %v", st.Member, err)
	}
	var made client.Sandbox
	c.Wait("a sandbox made by the node alone", func(ctx context.Context) bool {
		made, err = node.Client().CreateSandbox(ctx, client.CreateSandbox{TimeoutSeconds: 900})
		return err == nil
	})
	for _, id := range []string{before.ID, made.ID} {
		if out, code := node.CLI(t.Context(), "sandbox", "exec", id, "echo $((6*7))"); code != 0 || out != "42\n" {
			t.Errorf("sandbox %s: exit code %d, output %q", id, code, out)
		}
	}
	if err := node.Client().KillSandbox(t.Context(), before.ID); err != nil {
		t.Error(err)
	}
	for _, args := range [][]string{{"key", "ls"}, {"token", "create"}, {"node", "cordon", node.Name}} {
		if out, code := node.CLI(t.Context(), args...); code == 0 {
			t.Errorf("%v on a node alone: %s", args, out)
		}
	}
	c.Server.Again()
	c.Wait("the server to know what was made", func(ctx context.Context) bool { return state(ctx, c.Server, made.ID) == "running" })
	if got := state(t.Context(), c.Server, before.ID); got == "running" {
		t.Errorf("the killed sandbox is %s on the server", got)
	}
	if out, code := c.Server.CLI(t.Context(), "sandbox", "exec", made.ID, "echo $((6*7))"); code != 0 || out != "42\n" {
		t.Errorf("by way of the server: exit code %d, output %q", code, out)
	}
}

// leaves takes a machine out of the cluster, checks that nodes end what it has open with them, and returns who it was.
func leaves(t *testing.T, c *harness.Cluster, m *harness.Machine) *auth.Identity {
	t.Helper()
	id, err := auth.OpenIdentity(filepath.Join(m.DataDir(), "identity"))
	if err != nil {
		t.Fatal(err)
	}
	c.Wait("the node's address", func(ctx context.Context) bool {
		n, err := c.Node(ctx, c.Nodes[0])
		return err == nil && n.Address != ""
	})
	open := direct(t, m, mustNode(t, c, c.Nodes[0]), id)
	if err := awaitEnd(open, 200*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a member's connection to a node: %v; want it open", err)
	}
	if out, code := m.CLI(t.Context(), "leave"); code != 0 {
		t.Fatalf("leave: exit code %d, %s", code, out)
	}
	if err := awaitEnd(open, 10*time.Second); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection to a node of a machine that left stays open")
	}
	return id
}

// health asks, through a proxy's machine, for the agent inside a sandbox.
func health(t *testing.T, from, proxy *harness.Machine, id string) int {
	t.Helper()
	hc := from.HTTP()
	defer hc.CloseIdleConnections()
	at := net.JoinHostPort(proxy.Addr.String(), "3002")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+at+"/sandbox/"+id+"/49983/health", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		t.Logf("health of %s by way of %s: %v", id, proxy.Name, err)
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// TestProxyApart serves traffic through a proxy that joined, also while no server runs and after each part has started again.
func TestProxyApart(t *testing.T) {
	t.Parallel()
	c := harness.NewCluster(t, harness.Shape{Nodes: 1})
	proxy := c.Join(c.Lab.Machine("edge"), "proxy", "--proxy-addr", "0.0.0.0:3002", "--insecure-listen")
	s, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	serves := func(when string) {
		t.Helper()
		c.Wait(when, func(context.Context) bool { return health(t, proxy, proxy, s.ID) == http.StatusNoContent })
	}
	serves("traffic through the proxy")
	c.Server.Signal(os.Interrupt)
	if got := health(t, proxy, proxy, s.ID); got != http.StatusNoContent {
		t.Errorf("without a server: %d", got)
	}
	c.Nodes[0].Signal(os.Interrupt)
	c.Nodes[0].Again()
	serves("traffic after the node has started again")
	c.Server.Again()
	serves("traffic after the server has started again")
	if out, code := proxy.CLI(t.Context(), "status"); code != 0 || !strings.Contains(out, "proxy") {
		t.Errorf("status: exit code %d, %s", code, out)
	}
}

// TestCertificatesAreRenewed lets several short certificates of every member end, one after the other: what is open goes on, directly to a
// node and by way of the server to one that cannot be dialed. Then it has every connection made anew.
func TestCertificatesAreRenewed(t *testing.T) {
	t.Parallel()
	const life, renewals = 10 * time.Second, 3
	c := harness.NewCluster(t, harness.Shape{
		Nodes: 1, Hidden: 1, Proxies: 1, Programs: []string{workloadDir}, Flags: []string{"--certificate-life", life.String()},
	})
	proxy := c.Proxies[0]
	var open []*stream
	hidden := ""
	for _, m := range c.Nodes {
		s := sandboxOn(t, c, m)
		hidden = s.ID
		work(t, c, proxy, s.ID)
		open = append(open, streamFrom(t, proxy, s.ID), streamFrom(t, c.Server, s.ID))
	}
	command := make(chan string, 1)
	go func() {
		out, code := c.Server.CLI(t.Context(), "sandbox", "exec", hidden, fmt.Sprintf("sleep %d; echo whole", int(2*life.Seconds())))
		command <- fmt.Sprintf("%d %s", code, out)
	}()
	members := append([]*harness.Machine{proxy}, c.Nodes...)
	ends := make(map[*harness.Machine][]time.Time)
	c.Wait("several renewals of every certificate", func(ctx context.Context) bool {
		done := true
		for _, m := range members {
			st, err := m.Client().Status(ctx)
			if err == nil && !slices.ContainsFunc(ends[m], st.Member.CertificateExpiresAt.Equal) {
				ends[m] = append(ends[m], st.Member.CertificateExpiresAt)
			}
			done = done && len(ends[m]) > renewals
		}
		return done
	})
	if out := <-command; out != "0 whole\n" {
		t.Errorf("a command that ran meanwhile: %q", out)
	}
	for _, s := range open {
		s.check(t)
	}
	c.Server.Signal(os.Interrupt)
	c.Server.Again()
	c.Wait("links with the new certificates", func(ctx context.Context) bool {
		return !slices.ContainsFunc(members, func(m *harness.Machine) bool {
			st, err := m.Client().Status(ctx)
			return err != nil || !st.Member.Connected
		})
	})
}

// TestComesBackAfterItsCertificateEnded has a node off for longer than its certificate is good.
func TestComesBackAfterItsCertificateEnded(t *testing.T) {
	t.Parallel()
	const life = 10 * time.Second
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Flags: []string{"--certificate-life", life.String()}})
	node := c.Nodes[0]
	last, err := node.Client().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	node.Signal(os.Interrupt)
	c.Wait("the end of its certificate", func(context.Context) bool { return time.Now().After(last.Member.CertificateExpiresAt.Add(time.Second)) })
	node.Again()
	c.Wait("the node to be back", func(ctx context.Context) bool {
		n, err := c.Node(ctx, node)
		return err == nil && n.State == "ready"
	})
}

// TestLeave takes a node out of its cluster, which it refuses while it has sandboxes, and lets the machine join again.
func TestLeave(t *testing.T) {
	t.Parallel()
	c := harness.NewCluster(t, harness.Shape{Nodes: 1})
	node := c.Nodes[0]
	s, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	if out, code := node.CLI(t.Context(), "leave"); code == 0 {
		t.Errorf("left with a sandbox: %s", out)
	}
	if got := state(t.Context(), c.Server, s.ID); got != "running" {
		t.Errorf("after the refusal the sandbox is %q", got)
	}
	if err := c.Client().KillSandbox(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if out, code := node.CLI(t.Context(), "leave"); code != 0 {
		t.Fatalf("leave: exit code %d, %s", code, out)
	}
	if _, err := os.Stat(node.DataDir()); !os.IsNotExist(err) {
		t.Errorf("the data directory: %v; want it gone", err)
	}
	c.Wait("the server to have forgotten the node", func(ctx context.Context) bool {
		all, err := c.Client().Nodes(ctx)
		return err == nil && len(all) == 0
	})
	c.Join(node, "node")
	c.Wait("the node to be back", func(ctx context.Context) bool {
		n, err := c.Node(ctx, node)
		return err == nil && n.State == "ready"
	})
}
