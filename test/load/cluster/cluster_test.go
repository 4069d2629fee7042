package cluster

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

const (
	agentPort = "49983" // of the agent in each sandbox, which answers /health
	workPort  = "8000"  // of the workload
	workload  = "../../hosts/testdata/workload"
	heapMiB   = "64"
)

// BenchmarkCluster measures on a server with a node and a proxy of its own, five nodes, and a proxy apart.
func BenchmarkCluster(b *testing.B) {
	s := suite{harness.NewCluster(b, harness.Shape{
		AllInOne: true, Nodes: 5, Proxies: 1, Programs: []string{workload}, Flags: []string{"--log-level", "info"},
	})}
	b.Run("create", s.create)
	b.Run("resume", s.resume)
	b.Run("move", s.move)
	b.Run("join", s.join)
	b.Run("kill", s.kill)
}

type suite struct{ *harness.Cluster }

// samples are times in the order in which they were measured.
type samples []time.Duration

func (s samples) percentile(p int) time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(len(sorted)*p/100, len(sorted)-1)]
}

// report makes the percentiles metrics of the benchmark, in milliseconds.
func (s samples) report(b *testing.B, name string) {
	b.Helper()
	for _, p := range []int{50, 95, 100} {
		b.ReportMetric(float64(s.percentile(p))/float64(time.Millisecond), fmt.Sprintf("%s-p%d-ms", name, p))
	}
	b.ReportMetric(0, "ns/op") // says nothing here
}

// on is the metadata that has a sandbox made on a node.
func on(node string) map[string]string {
	return map[string]string{"cloister.dev/node-selector": "cloister.dev/hostname=" + node}
}

// still waits until no node makes a sandbox, whether for a request or for its pool.
func (s suite) still(b *testing.B) {
	b.Helper()
	var before []string
	same := 0
	s.Wait("the pools to be full", func(ctx context.Context) bool {
		nodes, err := s.Client().Nodes(ctx)
		now := make([]string, 0, len(nodes))
		for _, n := range nodes {
			now = append(now, fmt.Sprint(n.Name, n.State, n.Warm, n.Creating, n.Sandboxes))
		}
		if err != nil || !slices.Equal(now, before) {
			before, same = now, 0
			return false
		}
		same++
		return same >= 25 // half a second
	})
}

// make makes a sandbox on a node, or on any, and says how long that took.
func (s suite) make(b *testing.B, in client.CreateSandbox, node string) (client.Sandbox, time.Duration) {
	b.Helper()
	in.TimeoutSeconds = 3600
	if node != "" {
		in.Metadata = on(node)
	}
	began := time.Now()
	box, err := s.Client().CreateSandbox(b.Context(), in)
	took := time.Since(began)
	if err != nil {
		b.Fatal(err)
	}
	return box, took
}

func (s suite) end(b *testing.B, id string) {
	b.Helper()
	if err := s.Client().KillSandbox(b.Context(), id); err != nil {
		b.Error(err)
	}
}

// create compares creates on the server's own node with those on the other, one after the other.
func (s suite) create(b *testing.B) {
	const count = 30
	nodes := []string{s.Server.Name, s.Nodes[0].Name}
	took := make([]samples, len(nodes))
	for round := range count + 1 {
		for i, node := range nodes {
			s.still(b)
			box, d := s.make(b, client.CreateSandbox{}, node)
			if round > 0 { // the first one fetches the template and fills the pool
				took[i] = append(took[i], d)
			}
			s.end(b, box.ID)
		}
	}
	took[0].report(b, "local")
	took[1].report(b, "remote")
	b.ReportMetric(float64(took[1].percentile(50)-took[0].percentile(50))/float64(time.Millisecond), "added-p50-ms")
}

// visitor sends requests to one sandbox through one proxy, over a connection that it keeps.
type visitor struct {
	client   *http.Client
	id, port string
}

func visit(proxy *harness.Machine, id, port string) visitor {
	return visitor{client: proxy.HTTP(), id: id, port: port}
}

func (v visitor) leave() { v.client.CloseIdleConnections() }

// ask sends one request and says how long its answer's first byte took.
func (v visitor) ask(ctx context.Context, path string) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:3002"+path, http.NoBody)
	if err != nil {
		return 0, err
	}
	req.Header.Set("E2b-Sandbox-Id", v.id)
	req.Header.Set("E2b-Sandbox-Port", v.port)
	began := time.Now()
	resp, err := v.client.Do(req)
	took := time.Since(began)
	if err != nil {
		return took, err
	}
	defer func() { _ = resp.Body.Close() }()
	if text, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode >= http.StatusMultipleChoices {
		return took, fmt.Errorf("%s: %s, %w", resp.Status, text, err)
	}
	return took, nil
}

// resume measures the first request to a paused sandbox that is idle: on the server's own node by way of its own proxy, and on
// the other node by way of the proxy apart. What a sandbox is paused in has its copy by then, as it has soon after a pause.
func (s suite) resume(b *testing.B) {
	const count = 20
	for _, way := range []struct {
		name, node string
		proxy      *harness.Machine
	}{{"local", s.Server.Name, s.Server}, {"remote", s.Nodes[0].Name, s.Proxies[0]}} {
		s.still(b)
		box, _ := s.make(b, client.CreateSandbox{AutoPause: true, AutoResume: true}, way.node)
		v := visit(way.proxy, box.ID, agentPort)
		var took samples
		for i := range count {
			if _, err := v.ask(b.Context(), "/health"); err != nil {
				b.Fatal(err)
			}
			if _, err := s.Client().PauseSandbox(b.Context(), box.ID, ""); err != nil {
				b.Fatal(err)
			}
			s.copied(box.ID, i+1)
			s.still(b)
			d, err := v.ask(b.Context(), "/health")
			if err != nil {
				b.Fatal(err)
			}
			took = append(took, d)
		}
		v.leave()
		s.end(b, box.ID)
		took.report(b, way.name)
	}
}

// copied waits until a sandbox was given a replica so many times.
func (s suite) copied(id string, times int) {
	s.Wait("a copy", func(ctx context.Context) bool {
		events, err := s.Client().Events(ctx, client.ListEvents{SandboxID: id, Type: "replicated"})
		return err == nil && len(events) >= times
	})
}

// move measures the longest that a client waits for an answer while its sandbox, which holds memory and is idle but for that
// client, moves from node to node.
func (s suite) move(b *testing.B) {
	const count = 6
	s.still(b)
	box, _ := s.make(b, client.CreateSandbox{}, "")
	if out, code := s.Server.CLI(b.Context(), "sandbox", "exec", "-u", "root", box.ID, "/bin/workload "+heapMiB+" >/dev/null 2>&1 &"); code != 0 {
		b.Fatalf("start the workload: exit code %d, %s", code, out)
	}
	v := visit(s.Proxies[0], box.ID, workPort)
	defer v.leave()
	s.Wait("the workload", func(ctx context.Context) bool { _, err := v.ask(ctx, "/ok"); return err == nil })
	var took samples
	for range count {
		s.still(b)
		from := s.home(b, box.ID)
		if _, err := s.Client().DrainNode(b.Context(), from, client.DrainNode{}); err != nil {
			b.Fatal(err)
		}
		took = append(took, s.longest(b, v, from))
		no := false
		if _, err := s.Client().UpdateNode(b.Context(), from, client.UpdateNode{Cordoned: &no}); err != nil {
			b.Fatal(err)
		}
	}
	s.end(b, box.ID)
	took.report(b, "pause")
}

// home returns the name of the node that a sandbox is on.
func (s suite) home(b *testing.B, id string) string {
	b.Helper()
	box, err := s.Client().GetSandbox(b.Context(), id)
	if err != nil {
		b.Fatal(err)
	}
	return s.Machine(box.NodeID).Name
}

// longest asks until a node is drained, and returns the longest that an answer took.
func (s suite) longest(b *testing.B, v visitor, node string) time.Duration {
	b.Helper()
	var longest time.Duration
	s.Wait("the drain", func(ctx context.Context) bool {
		d, err := v.ask(ctx, "/ok")
		if err != nil {
			b.Fatal(err)
		}
		longest = max(longest, d)
		n, err := s.Client().Node(ctx, node)
		return err == nil && n.State == "drained"
	})
	return longest
}

// join measures from the call of `cloister join` on a new machine to the first sandbox on it.
func (s suite) join(b *testing.B) {
	const count = 4
	var took samples
	for i := range count {
		s.still(b)
		m := s.Lab.Machine(fmt.Sprintf("new%d", i+1))
		began := time.Now()
		s.Join(m, "node")
		var box client.Sandbox
		s.Wait("a first sandbox", func(ctx context.Context) (ok bool) {
			var err error
			box, err = s.Client().CreateSandbox(ctx, client.CreateSandbox{TimeoutSeconds: 60, Metadata: on(m.Name)})
			return err == nil
		})
		took = append(took, time.Since(began))
		s.end(b, box.ID)
		s.still(b)
		m.Kill() // its pool would take the processors from the next
		if err := s.Client().RemoveNode(b.Context(), m.Name, true); err != nil {
			b.Fatal(err)
		}
	}
	took.report(b, "join")
}

// kill measures from the death of a node's machine until the server calls the node down and its sandbox lost.
func (s suite) kill(b *testing.B) {
	const count = 2
	node := s.Nodes[0]
	var took samples
	for range count {
		s.still(b)
		box, _ := s.make(b, client.CreateSandbox{}, node.Name)
		node.Kill()
		began := time.Now()
		s.Wait("the node to be down", func(ctx context.Context) bool {
			n, err := s.Node(ctx, node)
			if err != nil || n.State != "down" {
				return false
			}
			got, err := s.Client().GetSandbox(ctx, box.ID)
			return err == nil && got.State == "lost"
		})
		took = append(took, time.Since(began))
		node.Again()
		s.Wait("the node to be back", func(ctx context.Context) bool {
			n, err := s.Node(ctx, node)
			return err == nil && n.State == "ready"
		})
	}
	took.report(b, "noticed")
}
