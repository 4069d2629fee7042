package hosts_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

const (
	workloadDir  = "testdata/workload"
	workloadPort = "8000"
	workloadMiB  = 32
)

// held is what a workload says that it holds, but for how often it was asked.
func held() string {
	return fmt.Sprintf("%x %q <nil>", sha256.Sum256(pattern(workloadMiB<<20)), "written before")
}

// pattern is the workload's.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// sandboxOn makes a sandbox on a node, the others being cordoned while it is made.
func sandboxOn(t *testing.T, c *harness.Cluster, m *harness.Machine) client.Sandbox {
	t.Helper()
	all, err := c.Client().Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cordon := func(yes bool) {
		for _, other := range all {
			if other.Name == m.Name || other.State != "ready" {
				continue
			}
			if _, err := c.Client().UpdateNode(t.Context(), other.ID, client.UpdateNode{Cordoned: &yes}); err != nil {
				t.Fatal(err)
			}
		}
	}
	cordon(true) // a selector would bind the sandbox for good
	s, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	cordon(false)
	if got := c.Machine(s.NodeID); got != m {
		t.Fatalf("sandbox on %s; want %s", got.Name, m.Name)
	}
	return s
}

// work starts the workload in a sandbox, and waits until it answers through a proxy.
func work(t *testing.T, c *harness.Cluster, from *harness.Machine, id string) {
	t.Helper()
	script := fmt.Sprintf("set -e; echo kept > /tmp/kept; /bin/workload %d >/dev/null 2>&1 & echo $! > /tmp/pid", workloadMiB)
	if out, code := c.Server.CLI(t.Context(), "sandbox", "exec", "-u", "root", id, script); code != 0 {
		t.Fatalf("start the workload: exit code %d, %s", code, out)
	}
	c.Wait("the workload", func(ctx context.Context) bool {
		got, err := ask(ctx, from, id, "/held")
		return err == nil && strings.HasPrefix(got, held())
	})
}

// checkWork looks at everything that a workload holds.
func checkWork(t *testing.T, c *harness.Cluster, from *harness.Machine, id string) {
	t.Helper()
	if got, err := ask(t.Context(), from, id, "/held"); err != nil || !strings.HasPrefix(got, held()) {
		t.Errorf("sandbox %s says %.200q, %v; want %q", id, got, err, held())
	}
	out, code := c.Server.CLI(t.Context(), "sandbox", "exec", "-u", "root", id, "cat /tmp/kept && kill -0 $(cat /tmp/pid)")
	if code != 0 || out != "kept\n" {
		t.Errorf("in sandbox %s: exit code %d, output %q", id, code, out)
	}
}

// answerError is an answer that is not 200.
type answerError struct {
	status int
	body   string
}

func (e *answerError) Error() string { return strconv.Itoa(e.status) + ": " + e.body }

// statusOf returns the status of an answer that was not 200; 0 where there was none.
func statusOf(err error) int {
	if a, ok := errors.AsType[*answerError](err); ok {
		return a.status
	}
	return 0
}

// ask sends one request to the workload in a sandbox through the proxy of a machine.
func ask(ctx context.Context, proxy *harness.Machine, id, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	h := proxy.HTTP()
	defer h.CloseIdleConnections()
	return send(ctx, h, id, path, nil)
}

// send sends a POST where there is a body.
func send(ctx context.Context, h *http.Client, id, path string, body []byte) (string, error) {
	method := http.MethodGet
	if body != nil {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://127.0.0.1:3002"+path, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("E2b-Sandbox-Id", id)
	req.Header.Set("E2b-Sandbox-Port", workloadPort)
	resp, err := h.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = &answerError{resp.StatusCode, string(text)}
	}
	return string(text), err
}

// traffic is one client that sends requests one after the other.
type traffic struct {
	name   string
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu      sync.Mutex
	count   int
	errs    []string
	longest time.Duration
}

// trafficTo sends requests to a sandbox through a proxy until stop is called: on one connection or, with fresh, on a new one
// each time, and with a body or without.
func trafficTo(t *testing.T, proxy *harness.Machine, id string, post, fresh bool) *traffic {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	f := &traffic{name: fmt.Sprintf("requests to %s by way of %s (post %t, fresh %t)", id, proxy.Name, post, fresh), cancel: cancel}
	f.done.Go(func() {
		h := proxy.HTTP()
		defer h.CloseIdleConnections()
		for ctx.Err() == nil {
			began := time.Now()
			path, body, want := "/ok", []byte(nil), "ok"
			if post {
				path, want = "/echo", strings.Repeat("x", 1000)
				body = []byte(want)
			}
			got, err := send(ctx, h, id, path, body)
			if ctx.Err() != nil {
				return
			}
			if err == nil && got != want {
				err = fmt.Errorf("answer of %d bytes, %.40q", len(got), got)
			}
			f.note(time.Since(began), err)
			if fresh {
				h.CloseIdleConnections()
			}
		}
	})
	t.Cleanup(f.stop)
	return f
}

func (f *traffic) stop() {
	f.cancel()
	f.done.Wait()
}

func (f *traffic) note(took time.Duration, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	f.longest = max(f.longest, took)
	if err != nil && len(f.errs) < 5 {
		f.errs = append(f.errs, err.Error())
	}
}

// check ends the requests and reports the errors that they met.
func (f *traffic) check(t *testing.T) {
	t.Helper()
	f.stop()
	t.Logf("%s: %d, the longest took %s", f.name, f.count, f.longest)
	if len(f.errs) > 0 || f.count == 0 {
		t.Errorf("%s: %d, errors: %s", f.name, f.count, strings.Join(f.errs, "\n"))
	}
}

// sentriesIn returns the machines that run a sandbox's process, each as often as it does.
func sentriesIn(t *testing.T, c *harness.Cluster, id string) []string {
	t.Helper()
	var out []string
	for _, m := range c.Nodes {
		for range sentries(t, m.DataDir(), id) {
			out = append(out, m.Name)
		}
	}
	return out
}
