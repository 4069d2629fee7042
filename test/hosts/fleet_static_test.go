package hosts_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestStaticFleet has the server dial a proxy that cannot dial it.
func TestStaticFleet(t *testing.T) {
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Programs: []string{workloadDir}, Flags: []string{"--lifecycle-recheck", "100ms"}})
	edge := c.Lab.Machine("edge")
	c.Lab.Mute(edge, c.Server)
	f := static{c, edge}
	f.refusals(t)
	f.join(t)
	c.Server.Signal(syscall.SIGTERM)
	c.Server.Again("--proxies", "https://"+net.JoinHostPort(edge.Addr.String(), "3005"))
	c.Wait("the node to be back", func(ctx context.Context) bool {
		n, err := c.Node(ctx, c.Nodes[0])
		return err == nil && n.State == "ready"
	})
	f.missing(t)
	s := f.sandbox(t)
	t.Run("idle", func(t *testing.T) { f.idle(t, s) })
	t.Run("server", func(t *testing.T) { f.server(t, s) })
	t.Run("proxy", func(t *testing.T) { f.proxy(t, s) })
}

// static is a cluster, and a proxy that waits for its server.
type static struct {
	*harness.Cluster
	edge *harness.Machine
}

// refusals looks at settings that contradict each other.
func (f static) refusals(t *testing.T) {
	t.Helper()
	for _, args := range [][]string{
		{"proxy", "--proxies", "https://192.0.2.9:3005"},
		{"server", "--link-addr", ":3005"},
		{"server", "--proxies", "https://192.0.2.9:3005,192.0.2.9"},
		{"server", "--proxies", "https://me@192.0.2.9:3005/path"},
	} {
		if out, code := f.edge.CLI(t.Context(), args...); code != 2 {
			t.Errorf("%q: exit code %d, %s", args, code, out)
		}
	}
}

// join makes the machine a member by way of a tunnel, as `ssh -R 3003:localhost:3003 edge` on the server makes one, and closes that.
func (f static) join(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if c, err := f.edge.Dial(ctx, "tcp", net.JoinHostPort(f.Server.Addr.String(), "3003")); err == nil {
		_ = c.Close()
		t.Fatal("the proxy can dial the server")
	}
	token := f.Token("proxy")
	defer tunnel(t, f.edge, f.Server, "127.0.0.1:3003")()
	out, code := f.edge.CLI(t.Context(), "join", "127.0.0.1:3003", "--token", token.Text, "--role", "proxy", "--name", f.edge.Name, "--no-start")
	if code != 0 {
		t.Fatalf("join: exit code %d, %s", code, out)
	}
}

// tunnel has connections to an address in one machine come out at the same address in another.
func tunnel(t *testing.T, from, to *harness.Machine, address string) (end func()) {
	t.Helper()
	l, err := from.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	var passing sync.WaitGroup
	passing.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			passing.Go(func() {
				defer func() { _ = in.Close() }()
				out, err := to.Dial(t.Context(), "tcp", address)
				if err != nil {
					return
				}
				passing.Go(func() { _, _ = io.Copy(in, out); _ = in.Close() })
				_, _ = io.Copy(out, in)
				_ = out.Close()
			})
		}
	})
	return func() { _ = l.Close(); passing.Wait() }
}

// missing has a sandbox idle while the proxy was not heard: it is not paused before, and it is once the proxy is there.
func (f static) missing(t *testing.T) {
	t.Helper()
	if got := proxyAt(t.Context(), f.Cluster, "unreachable"); got.State == "" {
		t.Error("no proxy is shown as unreachable")
	}
	s, err := f.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 1, AutoPause: true, IdleTimeout: true})
	if err != nil {
		t.Fatal(err)
	}
	f.past(t, s.ID)
	f.edge.Start("proxy", "--link-addr", ":3005")
	f.ready(t)
	f.Wait("the idle sandbox to be paused", func(ctx context.Context) bool { return state(ctx, f.Server, s.ID) == "paused" })
	if err := f.Client().KillSandbox(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
}

// past waits until two seconds after a sandbox's end, and checks that it runs.
func (f static) past(t *testing.T, id string) {
	t.Helper()
	end := time.Now().Add(3 * time.Second) // a timeout of one second, counted from the last use
	f.Wait("an end to pass", func(context.Context) bool { return time.Now().After(end) })
	if got := state(t.Context(), f.Server, id); got != "running" {
		t.Errorf("sandbox %s is %s; want it running", id, got)
	}
}

func (f static) ready(t *testing.T) {
	t.Helper()
	f.Wait("the proxy to be ready", func(ctx context.Context) bool {
		status, _ := probe(ctx, f.edge, "/readyz")
		return status == http.StatusOK && proxyOf(ctx, f.Cluster, f.edge).State == "ready"
	})
}

// proxyAt returns a proxy that is in a state.
func proxyAt(ctx context.Context, c *harness.Cluster, state string) client.Proxy {
	all, err := c.Client().Proxies(ctx)
	for i := range all {
		if err == nil && all[i].State == state {
			return all[i]
		}
	}
	return client.Proxy{}
}

// sandbox makes one that works, and that is paused a second after its last use and resumed by the next.
func (f static) sandbox(t *testing.T) client.Sandbox {
	t.Helper()
	s, err := f.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 1, AutoPause: true, AutoResume: true, IdleTimeout: true})
	if err != nil {
		t.Fatal(err)
	}
	work(t, f.Cluster, f.edge, s.ID)
	return s
}

// idle has a sandbox paused when nobody uses it, not while somebody does, and resumed by a request.
func (f static) idle(t *testing.T, s client.Sandbox) {
	t.Helper()
	f.Wait("the sandbox to be paused", func(ctx context.Context) bool { return state(ctx, f.Server, s.ID) == "paused" })
	checkWork(t, f.Cluster, f.edge, s.ID)
	stream := fleet{f.Cluster, s.ID}.upload(t, f.edge)
	f.past(t, s.ID)
	stream.end(t)
	f.Wait("the sandbox to be paused again", func(ctx context.Context) bool { return state(ctx, f.Server, s.ID) == "paused" })
}

// server takes the server away while a request is open: the proxy goes on, and nothing is paused when the server is back.
func (f static) server(t *testing.T, s client.Sandbox) {
	t.Helper()
	checkWork(t, f.Cluster, f.edge, s.ID)
	stream := fleet{f.Cluster, s.ID}.upload(t, f.edge)
	f.Server.Signal(syscall.SIGKILL)
	if got, err := ask(t.Context(), f.edge, s.ID, "/ok"); err != nil || got != "ok" {
		t.Errorf("without a server: %q, %v", got, err)
	}
	f.Server.Again()
	f.ready(t)
	f.past(t, s.ID)
	stream.end(t)
	f.Wait("the sandbox to be paused", func(ctx context.Context) bool { return state(ctx, f.Server, s.ID) == "paused" })
}

// proxy ends the proxy softly and hard; the server finds it again. One that was told to stop takes connections for a while, and a
// second signal ends that.
func (f static) proxy(t *testing.T, s client.Sandbox) {
	t.Helper()
	f.edge.Signal(syscall.SIGTERM)
	f.edge.Again("--proxy-drain-delay", "5m")
	f.ready(t)
	if err := syscall.Kill(f.edge.PID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	f.Wait("the proxy to say that it stops", func(ctx context.Context) bool {
		status, _ := probe(ctx, f.edge, "/readyz")
		return status == http.StatusServiceUnavailable
	})
	f.Wait("the proxy to leave the list", func(ctx context.Context) bool {
		p := proxyOf(ctx, f.Cluster, f.edge)
		return p.State == "absent" || p.State == "leaving"
	})
	checkWork(t, f.Cluster, f.edge, s.ID)
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		f.edge.Signal(sig)
		f.edge.Again()
		f.ready(t)
		checkWork(t, f.Cluster, f.edge, s.ID)
	}
}
