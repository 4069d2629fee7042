package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/fake"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// pass lets time pass and what it caused settle.
func pass(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // the bubble's clock
	synctest.Wait()
}

func TestTimeout(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		short := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(10 * time.Second) })
		long := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(20 * time.Second) })
		pass(9999 * time.Millisecond)
		if got := n.state(short); got != "running" {
			t.Errorf("just before: %s", got)
		}
		pass(2 * time.Millisecond)
		if got := n.state(short); got != "deleted: timeout" {
			t.Errorf("just after: %s", got)
		}
		if got := n.state(long); got != "running" {
			t.Errorf("the other one: %s", got)
		}
		if got := m.server.types(short); got != "created started timed_out" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		pass(time.Hour) // long after the retention
		if _, ok := n.get(short); ok {
			t.Error("an ended sandbox is remembered for ever")
		}
		if recs, err := n.jour.Records(t.Context()); err != nil || len(recs) != 0 {
			t.Errorf("%d records, %v", len(recs), err)
		}
	})
}

func TestSetTimeout(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(100 * time.Second) })
		set := func(d *durationpb.Duration, extend bool) time.Duration {
			t.Helper()
			resp, err := n.SetTimeout(t.Context(), &agentv1.SetTimeoutRequest{Id: string(id), Timeout: d, ExtendOnly: extend})
			if err != nil {
				t.Fatal(err)
			}
			if resp.GetSandbox().GetEndAt() == nil {
				return -1
			}
			return time.Until(resp.GetSandbox().GetEndAt().AsTime())
		}
		sec := func(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Second) }
		for _, c := range []struct {
			d      *durationpb.Duration
			extend bool
			want   time.Duration
		}{
			{sec(50), true, 100 * time.Second},
			{sec(200), true, 200 * time.Second},
			{sec(60), false, 60 * time.Second},
			{nil, true, -1},
			{sec(10), true, -1},
			{sec(10), false, 10 * time.Second},
		} {
			if got := set(c.d, c.extend); got != c.want {
				t.Errorf("set %v, extend only %v: %v, want %v", c.d.AsDuration(), c.extend, got, c.want)
			}
		}
		set(sec(0), false)
		synctest.Wait()
		if got := n.state(id); got != "deleted: timeout" {
			t.Errorf("after a timeout of 0: %s", got)
		}
		_, err := n.SetTimeout(t.Context(), &agentv1.SetTimeoutRequest{Id: string(id), Timeout: sec(5)})
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("timeout of an ended sandbox: %v", err)
		}
		if got := m.server.types(id); got != "created started "+strings.Repeat("timeout_set ", 5)+"timed_out" {
			t.Errorf("reported: %q", got)
		}
	})
}

func TestEndsByItself(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(m *machine, id sandbox.ID) error
		want string
	}{
		"out of memory": {func(m *machine, id sandbox.ID) error { return m.host.OOM(id) }, "failed: out of memory: the limit is 256 MiB"},
		"crash":         {func(m *machine, id sandbox.ID) error { return m.host.Crash(id) }, "failed: the sentry was killed by signal 9 (killed)"},
		"exit": {
			func(m *machine, id sandbox.ID) error { return m.host.End(id, engine.Exit{Code: 1}) },
			"failed: the sandbox's first process exited with code 1",
		},
		"gone": {func(m *machine, id sandbox.ID) error { return m.host.End(id, engine.Exit{Code: -1}) }, "failed: the sandbox's process was killed"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *machine) {
				t := m.t
				n := m.boot()
				id := n.create()
				conn, err := n.DialGuest(t.Context(), id, 8080)
				if err != nil {
					t.Fatal(err)
				}
				if err := c.end(m, id); err != nil {
					t.Fatal(err)
				}
				if _, err := conn.Read(make([]byte, 1)); err == nil {
					t.Error("the open connection went on")
				}
				synctest.Wait()
				if got := n.state(id); got != c.want {
					t.Errorf("state %q, want %q", got, c.want)
				}
				if got := m.server.types(id); got != "created started failed" {
					t.Errorf("reported: %q", got)
				}
				_, err = n.DialGuest(t.Context(), id, 8080)
				if !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), strings.TrimPrefix(c.want, "failed: ")) {
					t.Errorf("dial after the end: %v", err)
				}
				n.verify()
			})
		})
	}
}

func TestDialGuest(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		if _, err := n.DialGuest(t.Context(), "unknown", 80); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("an unknown sandbox: %v", err)
		}
		if _, err := n.DialGuest(t.Context(), id, 1); !errors.Is(err, sandbox.ErrUnavailable) || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a closed port: %v", err)
		}
		var conns []net.Conn
		for range 3 {
			c, err := n.DialGuest(t.Context(), id, 80)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
		}
		if err := conns[0].Close(); err != nil {
			t.Error(err)
		}
		in, _ := n.get(id)
		if len(in.conns) != 2 {
			t.Errorf("%d connections are tracked, want 2", len(in.conns))
		}
		if err := n.kill(id); err != nil {
			t.Fatal(err)
		}
		for _, c := range conns {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("an open connection went on after the kill")
			}
		}
	})
}

// TestDialGuestOverTCP shows that a connection into a sandbox keeps what TCP connections can do, and is reset at the end.
func TestDialGuestOverTCP(t *testing.T) {
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	in := newInstance(&journal.Record{Sandbox: sandbox.Sandbox{ID: "x", State: sandbox.StateRunning}})
	near, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	c, err := in.track(near, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := c.(io.ReaderFrom); !ok {
		t.Error("no ReadFrom, so no splice into it")
	}
	if _, ok := c.(io.WriterTo); !ok {
		t.Error("no WriteTo, so no splice out of it")
	}
	if nc, ok := c.(interface{ NetConn() net.Conn }); !ok || nc.NetConn() != near {
		t.Error("the TCP connection itself cannot be had")
	}
	in.closeConns()
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the guest's side reads %v, want a reset", err)
	}
	if _, err := in.track(near, false); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a connection after the end: %v", err)
	}
}

// stubborn is an engine whose guests do not stop at once.
type stubborn struct {
	engine.Engine
	mu   sync.Mutex
	left int
}

func (s *stubborn) Stop(ctx context.Context, id sandbox.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left > 0 {
		s.left--
		return errTest
	}
	return s.Engine.Stop(ctx, id)
}

func TestStopIsTriedAgain(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.load()
		s := &stubborn{Engine: fake.New(m.host)}
		n.engine = s
		n.run()
		id := n.create()
		s.left = 3
		if err := n.kill(id); !errors.Is(err, sandbox.ErrUnavailable) || !errors.Is(err, errTest) {
			t.Errorf("kill: %v", err)
		}
		if got := n.state(id); got != "stopping" {
			t.Errorf("state: %s", got)
		}
		if n.jour.Ledger().Allocated.Sandboxes != 1 {
			t.Error("what may still run holds nothing any more")
		}
		pass(5 * time.Second)
		if got := n.state(id); got != "deleted: killed" {
			t.Errorf("state: %s", got)
		}
		n.verify()

		// The same for a create that fails.
		s.left = 2
		m.net.failNext = nil
		m.onGuest(func(_ sandbox.ID, r *http.Request) (int, string) {
			if r.URL.Path == "/init" {
				return 500, "no"
			}
			return 0, ""
		})
		if _, err := n.Create(t.Context(), request()); err == nil {
			t.Error("created")
		}
		if n.jour.Ledger().Allocated.Sandboxes != 1 {
			t.Error("what may still run holds nothing any more")
		}
		pass(5 * time.Second)
		n.verify()
		if n.jour.Ledger().Allocated.Sandboxes != 0 {
			t.Error("it was not cleared away")
		}
	})
}

func TestManyExpireAtOnce(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		for range 60 {
			n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(10 * time.Second) })
		}
		pass(11 * time.Second)
		n.verify()
		if got := n.jour.Ledger().Allocated.Sandboxes; got != 0 {
			t.Errorf("%d are left", got)
		}
	})
}

func TestMetrics(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.Samples = 3
		n := m.boot()
		id := n.create()
		pass(2 * time.Second)
		use := func(cpu time.Duration) {
			t.Helper()
			if err := m.host.SetUsage(id, engine.Stats{CPUTime: cpu, MemoryBytes: 10, CacheBytes: 5, DiskBytes: 7}); err != nil {
				t.Fatal(err)
			}
		}
		get := func(req *agentv1.MetricsRequest) []*agentv1.MetricSample {
			t.Helper()
			req.Id = string(id)
			resp, err := n.Metrics(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetSamples()
		}
		use(500 * time.Millisecond)
		s := get(&agentv1.MetricsRequest{})
		if len(s) != 1 || s[0].GetCpuUsedPercent() != 25 || s[0].GetCpuCount() != 1 || s[0].GetMemoryTotalBytes() != 256*mib ||
			s[0].GetMemoryUsedBytes() != 10 || s[0].GetMemoryCacheBytes() != 5 || s[0].GetDiskUsedBytes() != 7 || s[0].GetDiskTotalBytes() != 1024*mib {
			t.Errorf("at once: %v", s)
		}
		for i := range 5 {
			use(500*time.Millisecond + time.Duration(i+1)*time.Second)
			pass(5 * time.Second)
		}
		s = get(&agentv1.MetricsRequest{})
		if len(s) != 3 || s[2].GetCpuUsedPercent() != 20 {
			t.Errorf("after 25 s: %v", s)
		}
		if s := get(&agentv1.MetricsRequest{Start: timestamppb.New(time.Now().Add(-6 * time.Second))}); len(s) != 1 {
			t.Errorf("the last 6 s: %v", s)
		}
		if s := get(&agentv1.MetricsRequest{End: timestamppb.New(time.Now().Add(-6 * time.Second))}); len(s) != 2 {
			t.Errorf("before that: %v", s)
		}
		if err := n.kill(id); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Metrics(t.Context(), &agentv1.MetricsRequest{Id: string(id)}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("of an ended sandbox: %v", err)
		}
	})
}

func TestLogs(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		get := func(req *agentv1.LogsRequest) (out []string) {
			t.Helper()
			req.Id = string(id)
			resp, err := n.Logs(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range resp.GetEntries() {
				out = append(out, e.GetLevel()+" "+e.GetLogger()+" "+e.GetMessage())
			}
			return out
		}
		if got := strings.Join(get(&agentv1.LogsRequest{}), "; "); got != "info envd early; info node sandbox started; info guest late" {
			t.Errorf("logs: %s", got)
		}
		if got := get(&agentv1.LogsRequest{Limit: 1}); len(got) != 1 {
			t.Errorf("limited: %v", got)
		}
		if got := get(&agentv1.LogsRequest{Start: timestamppb.New(time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC))}); len(got) != 1 {
			t.Errorf("from a time: %v", got)
		}
		m.mu.Lock()
		m.silent = true
		m.mu.Unlock()
		if got := get(&agentv1.LogsRequest{}); len(got) != 1 {
			t.Errorf("of a silent guest: %v", got)
		}
		if err := m.host.OOM(id); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := get(&agentv1.LogsRequest{}); len(got) != 2 || got[1] != "error node sandbox ended: out of memory: the limit is 256 MiB" {
			t.Errorf("after the end: %v", got)
		}
		if _, err := n.Logs(t.Context(), &agentv1.LogsRequest{Id: string(id), Limit: 1e6}); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("a large limit: %v", err)
		}
	})
}

func FuzzGuestLogs(f *testing.F) {
	f.Add([]byte(`[{"time":"2026-01-01T00:00:00Z","level":"info","logger":"envd","message":"m","fields":{"a":"b"}}]`))
	f.Add([]byte(`[{"time":"9999-12-31T23:59:59-23:59"},{"message":"\ud800"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := parseGuestLogs(data)
		if err != nil {
			return
		}
		if len(entries) > maxLogs {
			t.Errorf("%d entries", len(entries))
		}
		for _, w := range toWireLogs(entries) {
			if len(w.GetMessage()) > maxLogText || len(w.GetFields()) > maxLogFields {
				t.Errorf("entry too large: %d bytes, %d fields", len(w.GetMessage()), len(w.GetFields()))
			}
			if w.GetTime() != nil && w.GetTime().CheckValid() != nil {
				t.Errorf("time %v", w.GetTime())
			}
		}
	})
}

func FuzzGuestAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nabc"))
	f.Fuzz(func(t *testing.T, data []byte) {
		near, far := net.Pipe()
		go func() {
			_ = far.SetDeadline(time.Now().Add(5 * time.Second))
			buf := make([]byte, 4096)
			_, _ = far.Read(buf)
			_, _ = far.Write(data)
			_ = far.Close()
		}()
		g := newGuestConn(near)
		defer g.close()
		req, err := guestRequest(t.Context(), http.MethodGet, "/health", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ans, err := g.do(req, maxGuestText); err == nil && len(ans.body) > maxGuestText {
			t.Errorf("body of %d bytes", len(ans.body))
		}
	})
}
