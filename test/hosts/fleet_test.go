package hosts_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestFleet has three proxies serve the same sandboxes, and takes them, and the server, away.
func TestFleet(t *testing.T) {
	c := harness.NewCluster(t, harness.Shape{Nodes: 2, Proxies: 3, Programs: []string{workloadDir}})
	s := sandboxOn(t, c, c.Nodes[0])
	work(t, c, c.Proxies[0], s.ID)
	for _, p := range c.Proxies {
		c.Wait(p.Name+" to be ready", func(ctx context.Context) bool { return proxyOf(ctx, c, p).State == "ready" })
	}
	f := fleet{c, s.ID}
	t.Run("health", f.health)
	t.Run("resume", f.resume)
	t.Run("cut", f.cut)
	t.Run("kill", f.kill)
	t.Run("restart", f.restart)
	if got, err := c.Client().GetSandbox(t.Context(), s.ID); err != nil || got.State != "running" || got.NodeID != s.NodeID {
		t.Errorf("after all of it: %+v, %v", got, err)
	}
}

// fleet is three proxies in front of a sandbox that is in use.
type fleet struct {
	*harness.Cluster
	id string
}

// proxyOf returns what the server says of a machine's proxy.
func proxyOf(ctx context.Context, c *harness.Cluster, m *harness.Machine) client.Proxy {
	all, err := c.Client().Proxies(ctx)
	for i := range all {
		if err == nil && all[i].Name == m.Name {
			return all[i]
		}
	}
	return client.Proxy{}
}

// through has every one of the machines' proxies carry requests to the sandbox at once.
func (f fleet) through(t *testing.T, machines ...*harness.Machine) []*traffic {
	t.Helper()
	out := make([]*traffic, 0, 2*len(machines))
	for _, m := range machines {
		out = append(out, trafficTo(t, m, f.id, true, false), trafficTo(t, m, f.id, false, true))
	}
	return out
}

func checkAll(t *testing.T, all []*traffic) {
	t.Helper()
	for _, one := range all {
		one.check(t)
	}
}

// probe asks a machine's proxy itself, from that machine.
func probe(ctx context.Context, m *harness.Machine, path string) (status int, body string) {
	h := m.HTTP()
	defer h.CloseIdleConnections()
	return get(ctx, h, "http://127.0.0.1:3002"+path)
}

// local asks what a machine's daemon answers on its socket.
func local(ctx context.Context, m *harness.Machine, path string) (status int, body string) {
	h := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(m.DataDir(), "cloister.sock"))
	}}}
	defer h.CloseIdleConnections()
	return get(ctx, h, "http://cloister"+path)
}

func get(ctx context.Context, h *http.Client, url string) (status int, body string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return 0, err.Error()
	}
	resp, err := h.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(text)
}

// health looks at what proxies say of themselves, and to whom.
func (f fleet) health(t *testing.T) {
	for _, p := range f.Proxies {
		for _, path := range []string{"/healthz", "/readyz"} {
			for where, ask := range map[string]func(context.Context, *harness.Machine, string) (int, string){"proxy-addr": probe, "socket": local} {
				if status, body := ask(t.Context(), p, path); status != http.StatusOK || len(body) > 60 || !strings.Contains(body, "ok") {
					t.Errorf("%s%s of %s: %d %q", where, path, p.Name, status, body)
				}
			}
		}
		if status, body := probe(t.Context(), p, "/metrics"); status != http.StatusBadRequest {
			t.Errorf("metrics for everybody: %d %.80q", status, body)
		}
	}
	out, code := f.Server.CLI(t.Context(), "proxy", "ls")
	if code != 0 || strings.Count(out, " ready ") != len(f.Proxies)+1 {
		t.Errorf("want the server's own and %d: proxy ls: exit code %d\n%s", len(f.Proxies), code, out)
	}
}

// resume has many requests by way of all proxies meet a paused sandbox.
func (f fleet) resume(t *testing.T) {
	s, err := f.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900, AutoPause: true, AutoResume: true})
	if err != nil {
		t.Fatal(err)
	}
	work(t, f.Cluster, f.Proxies[1], s.ID)
	if out, code := f.Server.CLI(t.Context(), "sandbox", "pause", s.ID); code != 0 {
		t.Fatalf("pause: exit code %d, %s", code, out)
	}
	const each = 20
	var asking sync.WaitGroup
	var failed atomic.Pointer[error]
	for i := range each * len(f.Proxies) {
		asking.Go(func() {
			if got, err := ask(t.Context(), f.Proxies[i%len(f.Proxies)], s.ID, "/ok"); err != nil || got != "ok" {
				err = fmt.Errorf("request %d: %q, %w", i, got, err)
				failed.Store(&err)
			}
		})
	}
	asking.Wait()
	if err := failed.Load(); err != nil {
		t.Error(*err)
	}
	var resumed int
	f.Wait("the resume to be in the history", func(ctx context.Context) bool {
		events, err := f.Client().Events(ctx, client.ListEvents{SandboxID: s.ID, Type: "resumed"})
		resumed = len(events)
		return err == nil && resumed > 0
	})
	if resumed != 1 {
		t.Errorf("%d requests resumed the sandbox %d times; want once", each*len(f.Proxies), resumed)
	}
	if err := f.Client().KillSandbox(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
}

// cut takes the way to the server from one proxy, which goes on with what it knows.
func (f fleet) cut(t *testing.T) {
	cut := f.Proxies[0]
	doomed := sandboxOn(t, f.Cluster, f.Nodes[1])
	work(t, f.Cluster, cut, doomed.ID)
	f.Lab.Partition(cut, f.Server)
	all := f.through(t, f.Proxies...)
	if err := f.Client().KillSandbox(t.Context(), doomed.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(t.Context(), cut, doomed.ID, "/ok"); statusOf(err) != http.StatusBadGateway || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a sandbox that was killed meanwhile: %v; want 502 that says so", err)
	}
	f.Wait("the proxy to say that it is stale", func(ctx context.Context) bool { return metric(ctx, cut, "cloister_routes_stale_seconds") > 0 })
	if _, err := ask(t.Context(), cut, "i"+doomed.ID[1:len(doomed.ID)-1]+"x", "/ok"); statusOf(err) != http.StatusServiceUnavailable {
		t.Errorf("an unknown sandbox without a server: %v; want 503", err)
	}
	if status, body := probe(t.Context(), cut, "/readyz"); status != http.StatusOK {
		t.Errorf("/readyz of a proxy that goes on: %d %q", status, body)
	}
	f.Wait("the server to miss the proxy", func(ctx context.Context) bool { return proxyOf(ctx, f.Cluster, cut).State == "silent" })
	f.Lab.Heal()
	f.Wait("the proxy to be back", func(ctx context.Context) bool { return proxyOf(ctx, f.Cluster, cut).State == "ready" })
	checkAll(t, all)
}

// kill takes away a proxy, and then the server, while the others carry requests.
func (f fleet) kill(t *testing.T) {
	dead := f.Proxies[1]
	all := f.through(t, f.Proxies[0], f.Proxies[2])
	dead.Kill()
	f.Server.Signal(syscall.SIGKILL)
	f.Server.Again()
	f.Wait("the proxies to be followed again", func(ctx context.Context) bool {
		return proxyOf(ctx, f.Cluster, f.Proxies[0]).State == "ready" && proxyOf(ctx, f.Cluster, f.Proxies[2]).State == "ready"
	})
	if got := proxyOf(t.Context(), f.Cluster, dead); got.State != "silent" {
		t.Errorf("the killed proxy is %q within its lease, after the server's restart too; want silent", got.State)
	}
	f.Wait("the server to know the sandbox again", func(ctx context.Context) bool {
		got, err := f.Client().GetSandbox(ctx, f.id)
		return err == nil && got.State == "running"
	})
	checkAll(t, all)
	dead.Again()
	f.Wait("the killed proxy to be back", func(ctx context.Context) bool { return proxyOf(ctx, f.Cluster, dead).State == "ready" })
}

// metric reads one of a machine's metrics.
func metric(ctx context.Context, m *harness.Machine, name string) float64 {
	_, text := local(ctx, m, "/metrics")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, _ := strconv.ParseFloat(strings.TrimSpace(value), 64) // 0 stands for anything else
			return n
		}
	}
	return 0
}

// restart replaces two proxies one after the other. A client that asks for a name which stands for both meets no error, and
// what is open through the first goes on until it ends.
func (f fleet) restart(t *testing.T) {
	first, second := f.Proxies[0], f.Proxies[2]
	both := newName(first, second)
	load := both.keepAsking(t, f.id)
	stream := f.upload(t, first)
	f.Wait("the upload to be seen", func(ctx context.Context) bool { return proxyOf(ctx, f.Cluster, first).Requests > 0 })
	ended := make(chan struct{})
	go func() { first.Signal(os.Interrupt); close(ended) }()
	f.Wait("the proxy to leave the list", func(ctx context.Context) bool {
		p := proxyOf(ctx, f.Cluster, first)
		return p.State == "absent" || p.State == "leaving"
	})
	stream.end(t)
	<-ended
	first.Again()
	second.Signal(syscall.SIGTERM)
	second.Again()
	for _, p := range []*harness.Machine{first, second} {
		f.Wait(p.Name+" to be back", func(ctx context.Context) bool { return proxyOf(ctx, f.Cluster, p).State == "ready" })
	}
	load.check(t)
}

// upload begins a request to the sandbox whose body does not end by itself.
func (f fleet) upload(t *testing.T, m *harness.Machine) *upload {
	t.Helper()
	conn, err := m.Dial(t.Context(), "tcp", net.JoinHostPort("127.0.0.1", "3002"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	u := &upload{conn: conn, head: "POST /echo HTTP/1.1\r\nHost: 127.0.0.1\r\nE2b-Sandbox-Id: " + f.id +
		"\r\nE2b-Sandbox-Port: " + workloadPort + "\r\nTransfer-Encoding: chunked\r\n\r\n"}
	u.send(t, u.head+"5\r\nfirst\r\n")
	return u
}

// upload is a request that is being sent.
type upload struct {
	conn net.Conn
	head string
}

func (u *upload) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(u.conn, text); err != nil {
		t.Errorf("send to a proxy that ends: %v", err)
	}
}

// end ends the body and looks at the answer.
func (u *upload) end(t *testing.T) {
	t.Helper()
	u.send(t, "4\r\nlast\r\n0\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(u.conn), nil)
	if err != nil {
		t.Errorf("the answer to what was open when its proxy was told to end: %v", err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	if body, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(body, []byte("firstlast")) {
		t.Errorf("%d %q, %v", resp.StatusCode, body, err)
	}
}

// name stands for several proxies: each new connection goes to the next of them, and to the one after where that does not
// answer.
type name struct {
	proxies []*harness.Machine
	next    atomic.Int64
}

func newName(proxies ...*harness.Machine) *name { return &name{proxies: proxies} }

func (n *name) dial(ctx context.Context, network, address string) (net.Conn, error) {
	var last error
	first := int(n.next.Add(1))
	for i := range n.proxies {
		c, err := n.proxies[(first+i)%len(n.proxies)].Dial(ctx, network, address)
		if err == nil {
			return c, nil
		}
		last = err
	}
	return nil, last
}

// keepAsking has clients with connections of their own, that they keep, ask until the load is checked.
func (n *name) keepAsking(t *testing.T, id string) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	for range 4 {
		l.done.Go(func() {
			h := &http.Client{Transport: &http.Transport{DialContext: n.dial}}
			defer h.CloseIdleConnections()
			for ctx.Err() == nil {
				_, err := send(ctx, h, id, "/ok", nil)
				if ctx.Err() != nil {
					return
				}
				l.sent.Add(1)
				if err != nil {
					err = fmt.Errorf("request %d: %w", l.sent.Load(), err)
					l.failed.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	t.Cleanup(func() { cancel(); l.done.Wait() })
	return l
}

// load is requests of many clients.
type load struct {
	stop   context.CancelFunc
	done   sync.WaitGroup
	sent   atomic.Int64
	failed atomic.Pointer[error]
}

func (l *load) check(t *testing.T) {
	t.Helper()
	l.stop()
	l.done.Wait()
	t.Logf("%d requests", l.sent.Load())
	if err := l.failed.Load(); err != nil {
		t.Error(*err)
	}
}
