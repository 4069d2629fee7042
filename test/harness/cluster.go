package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

// clusterTimeout bounds how long a cluster may take to be whole.
const clusterTimeout = time.Minute

// Shape is what a cluster is made of.
type Shape struct {
	Nodes, Proxies int
	// Hidden nodes are behind network address translation; they come after the others.
	Hidden int
	// AllInOne makes the first machine run a node and a proxy too, as `cloister up` does.
	AllInOne bool
	// Flags are given to every daemon.
	Flags []string
	// Programs are the directories of commands that the default template has in /bin.
	Programs []string
	// Disk is the size of the disk, such as 2G, that each machine gets for its data; empty has it share that of the test.
	Disk string
}

// Cluster is a server, nodes and proxies, each a machine of one lab.
type Cluster struct {
	Lab            *Lab
	Server         *Machine
	Nodes, Proxies []*Machine

	tb    testing.TB
	flags []string
}

// NewCluster starts a cluster whose default template is a tiny tree, and returns when every node can be given a sandbox.
func NewCluster(tb testing.TB, s Shape) *Cluster {
	tb.Helper()
	tree := TinyTree(tb)
	for _, dir := range s.Programs {
		build(tb, dir, filepath.Join(tree, "bin", filepath.Base(dir)))
	}
	c := &Cluster{Lab: NewLab(tb), tb: tb, flags: append([]string{"--base-sources", "dir:" + tree}, s.Flags...)}
	c.Lab.disk = s.Disk
	c.Server = c.Lab.Machine("server")
	role := "server"
	if s.AllInOne {
		role = "up"
	}
	at := net.JoinHostPort(c.Server.Addr.String(), "3003")
	c.Server.Start(append([]string{role, "--cluster-advertise", at}, c.flags...)...)
	for i := range s.Nodes + s.Hidden {
		add := c.Lab.Machine
		if i >= s.Nodes {
			add = c.Lab.NAT
		}
		c.Nodes = append(c.Nodes, c.Join(add(fmt.Sprintf("node%d", i+1)), "node"))
	}
	for i := range s.Proxies {
		c.Proxies = append(c.Proxies, c.Join(c.Lab.Machine(fmt.Sprintf("proxy%d", i+1)), "proxy"))
	}
	c.Wait("every node ready", func(ctx context.Context) bool {
		nodes, err := c.Client().Nodes(ctx)
		ready := 0
		for _, n := range nodes {
			if n.State == "ready" {
				ready++
			}
		}
		return err == nil && ready == len(nodes) && slices.Contains([]int{len(c.Nodes), len(c.Nodes) + 1}, ready)
	})
	if len(c.Nodes) > 0 || s.AllInOne {
		c.Wait("a first sandbox", func(ctx context.Context) bool {
			sb, err := c.Client().CreateSandbox(ctx, client.CreateSandbox{TimeoutSeconds: 60})
			return err == nil && c.Client().KillSandbox(ctx, sb.ID) == nil
		})
	}
	return c
}

// build compiles a command without cgo.
func build(tb testing.TB, dir, to string) {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), "go", "build", "-trimpath", "-o", to, "./"+dir) //nolint:gosec // the test's own command
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", dir, err, out)
	}
}

// Client returns a client of the server.
func (c *Cluster) Client() *client.Client { return c.Server.Client() }

// Token makes a join token for one machine, with further flags of `cloister token create`.
func (c *Cluster) Token(role string, flags ...string) client.CreatedToken {
	c.tb.Helper()
	out, code := c.Server.CLI(c.tb.Context(), append([]string{"token", "create", "--role", role, "-o", "json"}, flags...)...)
	var token client.CreatedToken
	if err := json.Unmarshal([]byte(out), &token); code != 0 || err != nil {
		c.tb.Fatalf("token create: exit code %d, %v: %s", code, err, out)
	}
	return token
}

// Join makes a machine a member and starts its role, with further flags of `cloister join`. Again starts the role alone.
func (c *Cluster) Join(m *Machine, role string, flags ...string) *Machine {
	c.tb.Helper()
	token := c.Token(role)
	args := append([]string{"join", net.JoinHostPort(c.Server.Addr.String(), "3003"), "--token", token.Text, "--role", role}, c.flags...)
	m.Start(append(args, flags...)...)
	m.starts = append(m.starts, append([]string{role}, c.flags...))
	return m
}

// Node returns what the server says of a machine's node.
func (c *Cluster) Node(ctx context.Context, m *Machine) (client.Node, error) {
	return c.Client().Node(ctx, m.Name)
}

// Machine returns the machine whose node has the id.
func (c *Cluster) Machine(nodeID string) *Machine {
	c.tb.Helper()
	n, err := c.Client().Node(c.tb.Context(), nodeID)
	if err != nil {
		c.tb.Fatal(err)
	}
	m := c.Lab.machines[n.Name]
	if m == nil {
		c.tb.Fatalf("no machine %s, whose node is %s", n.Name, nodeID)
	}
	return m
}

// Wait blocks until ok.
func (c *Cluster) Wait(what string, ok func(ctx context.Context) bool) {
	c.tb.Helper()
	ctx, cancel := context.WithTimeout(c.tb.Context(), clusterTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok(ctx) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			c.tb.Fatalf("%s: not within %s", what, clusterTimeout)
		}
	}
}
