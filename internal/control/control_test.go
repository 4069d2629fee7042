package control_test

import (
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// asleep lets a test bubble's clock move on.
func asleep(d time.Duration) { <-time.After(d) }

func minute() control.CreateRequest { return control.CreateRequest{Timeout: time.Minute} }

func mustCreate(t *testing.T, c *apitest.Cluster, req control.CreateRequest) sandbox.Sandbox {
	t.Helper()
	box, err := c.Control.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return box
}

func TestCreate(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, control.CreateRequest{
		Metadata: map[string]string{"user": "ann"}, Env: map[string]string{"A": "b"}, Timeout: time.Minute, Secure: true,
		Resources: sandbox.Resources{MemoryBytes: 1 << 30},
	})
	if box.ID.Node() != "aaaaaa" || box.State != sandbox.StateRunning || box.TemplateName != "base" {
		t.Errorf("created %+v", box)
	}
	sent := c.Node.Created()[0]
	if sent.GetImageDigest() != apitest.BaseDigest || sent.GetResources().GetMemoryBytes() != 1<<30 ||
		sent.GetResources().GetMilliCpu() != 2000 || sent.GetEnv()["A"] != "b" {
		t.Errorf("sent %v", sent)
	}
	got, err := c.Control.Get(t.Context(), box.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(box, got); diff != "" {
		t.Error(diff)
	}
	if token := c.Control.AccessToken(got); len(token) != 64 {
		t.Errorf("token %q", token)
	}
	if token := c.Control.AccessToken(mustCreate(t, c, minute())); token != "" {
		t.Errorf("an open sandbox has the token %q", token)
	}
}

func TestCreateRefusals(t *testing.T) {
	big := strings.Repeat("x", 5000)
	many := map[string]string{}
	for i := range 200 {
		many[strconv.Itoa(i)] = ""
	}
	tests := []struct {
		name string
		req  control.CreateRequest
		kind error
		want string
	}{
		{"no timeout", control.CreateRequest{}, sandbox.ErrInvalid, "timeout 0s: want 1 to 86400 seconds"},
		{"negative timeout", control.CreateRequest{Timeout: -5 * time.Second}, sandbox.ErrInvalid, "timeout -5s"},
		{"long timeout", control.CreateRequest{Timeout: 25 * time.Hour}, sandbox.ErrInvalid, "timeout 25h0m0s: want 1 to 86400"},
		{"empty metadata key", control.CreateRequest{Timeout: time.Second, Metadata: map[string]string{"": "v"}}, sandbox.ErrInvalid, "empty key"},
		{"long metadata", control.CreateRequest{Timeout: time.Second, Metadata: map[string]string{"k": big}}, sandbox.ErrInvalid, "5000 bytes"},
		{"much metadata", control.CreateRequest{Timeout: time.Second, Metadata: many}, sandbox.ErrInvalid, "200 entries: want at most 128"},
		{"bad env", control.CreateRequest{Timeout: time.Second, Env: map[string]string{"A=B": ""}}, sandbox.ErrInvalid, "neither '='"},
		{"bad env value", control.CreateRequest{Timeout: time.Second, Env: map[string]string{"A": "\x00"}}, sandbox.ErrInvalid, "NUL"},
		{"bad template", control.CreateRequest{Timeout: time.Second, Template: "../etc"}, sandbox.ErrInvalid, `template name "../etc"`},
		{"unknown template", control.CreateRequest{Timeout: time.Second, Template: "nope"}, sandbox.ErrNotFound, `template "nope" does not exist`},
		{"unknown tag", control.CreateRequest{Timeout: time.Second, Template: "base:v9"}, sandbox.ErrNotFound, `"base:v9" does not exist`},
		{"tiny", control.CreateRequest{Timeout: time.Second, Resources: sandbox.Resources{MemoryBytes: 5}}, sandbox.ErrInvalid, "5 bytes of memory: want at least"},
		{"huge", control.CreateRequest{Timeout: time.Second, Resources: sandbox.Resources{MilliCPU: 1 << 50}}, sandbox.ErrInvalid, "no node is large enough"},
	}
	c := apitest.NewCluster(t, nil)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.Control.Create(t.Context(), tt.req)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %v with %q", err, tt.kind, tt.want)
			}
		})
	}
	if n := len(c.Node.Created()); n != 0 {
		t.Errorf("%d requests reached the node", n)
	}
}

func TestCreateByIDAndTag(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	for _, ref := range []string{"base", "BASE", "base:default", string(apitest.BaseID)} {
		req := minute()
		req.Template = ref
		if box := mustCreate(t, c, req); box.TemplateName != "base" || box.TemplateID != apitest.BaseID {
			t.Errorf("%s gave %+v", ref, box)
		}
	}
	before := c.Records.TemplateReads()
	for range 100 {
		mustCreate(t, c, minute())
	}
	if n := c.Records.TemplateReads() - before; n > 2 {
		t.Errorf("100 creates read the template %d times", n)
	}
}

func TestCreateGoesOn(t *testing.T) {
	full := connect.NewError(connect.CodeResourceExhausted, errors.New("full"))
	away := connect.NewError(connect.CodeUnavailable, errors.New("connection refused"))
	broken := connect.NewError(connect.CodeInternal, errors.New("disk on fire"))
	tests := []struct {
		name  string
		first error
		kind  error // nil: the second node takes it
	}{
		{"full", full, nil},
		{"away", away, nil},
		{"a refusal that is the same everywhere", connect.NewError(connect.CodeInvalidArgument, errors.New("no")), sandbox.ErrInvalid},
		{"broken", broken, broken},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := apitest.NewCluster(t, nil)
			second := apitest.NewNode("bbbbbb")
			c.Join(t, second)
			c.Node.Fail(tt.first)
			// Load decides who is asked first: the first node has a sandbox less.
			if err := c.Report(t, second, false); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				box, err := c.Control.Create(t.Context(), minute())
				if tt.kind == nil && (err != nil || box.NodeID != "bbbbbb") {
					t.Fatalf("got %s, %v", box.NodeID, err)
				}
				if tt.kind != nil && err != nil && !errors.Is(err, tt.kind) {
					t.Fatalf("error %v", err)
				}
				if tt.kind != nil && err != nil {
					return
				}
			}
			if tt.kind != nil {
				t.Error("the first node was never asked")
			}
		})
	}
}

func TestCreateWithoutRoom(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	c.Node.Room = 2
	mustCreate(t, c, minute())
	mustCreate(t, c, minute())
	_, err := c.Control.Create(t.Context(), minute())
	if !errors.Is(err, sandbox.ErrExhausted) || !strings.Contains(err.Error(), "node aaaaaa has no room") {
		t.Error(err)
	}
	c.Agents.Set("aaaaaa", nil)
	if _, err = c.Control.Create(t.Context(), minute()); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Error(err)
	}
	empty := apitest.NewCluster(t, nil)
	empty.Restart(t, nil)
	if _, err = empty.Control.Create(t.Context(), minute()); !errors.Is(err, sandbox.ErrExhausted) || !strings.Contains(err.Error(), "is down") {
		t.Error(err)
	}
}

func TestKill(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	if err := c.Control.Kill(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
	for _, id := range []sandbox.ID{box.ID, "iaaaaaaxxxxxxxxxxxxx", "nonsense"} {
		if err := c.Control.Kill(t.Context(), id); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("kill %s: %v", id, err)
		}
	}
	// The node's report, sent before the kill and arriving late, must not bring it back.
	if err := c.Report(t, c.Node, false); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), "killed on request") {
		t.Error(err)
	}
	route, err := c.Control.Route(t.Context(), box.ID)
	if err != nil || route.State != sandbox.StateDeleted || route.Reason == "" {
		t.Errorf("route %+v, %v", route, err)
	}
}

func TestFailedSandbox(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	c.Node.Crash(box.ID, "out of memory: limit 512 MiB")
	if err := c.Report(t, c.Node, false); err != nil {
		t.Fatal(err)
	}
	got, err := c.Control.Get(t.Context(), box.ID)
	if err != nil || got.State != sandbox.StateFailed || got.Reason != "out of memory: limit 512 MiB" {
		t.Errorf("%+v, %v", got, err)
	}
	_, _, err = c.Control.Connect(t.Context(), box.ID, control.ConnectRequest{Timeout: time.Minute})
	if !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), "out of memory") {
		t.Error(err)
	}
	if err := c.Control.Kill(t.Context(), box.ID); err != nil {
		t.Errorf("clear away: %v", err)
	}
	if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

func TestTimeout(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
	same, err := c.Control.Extend(t.Context(), box.ID, time.Minute)
	if err != nil || !same.EndAt.Equal(box.EndAt) {
		t.Errorf("extending moved the end from %v to %v, %v", box.EndAt, same.EndAt, err)
	}
	short, err := c.Control.SetTimeout(t.Context(), box.ID, time.Minute)
	if err != nil || !short.EndAt.Before(box.EndAt) {
		t.Errorf("the end is %v, %v", short.EndAt, err)
	}
	got, _ := c.Control.Get(t.Context(), box.ID)
	if !got.EndAt.Equal(short.EndAt) {
		t.Errorf("the index has %v", got.EndAt)
	}
	never, err := c.Control.SetTimeout(t.Context(), box.ID, control.Never)
	if err != nil || !never.EndAt.IsZero() {
		t.Errorf("never is %v, %v", never.EndAt, err)
	}
	if _, err := c.Control.SetTimeout(t.Context(), box.ID, 48*time.Hour); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
	if _, err := c.Control.SetTimeout(t.Context(), "iaaaaaaxxxxxxxxxxxxx", time.Minute); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

func TestListPages(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	var ids []sandbox.ID
	for i := range 25 {
		req := minute()
		req.Metadata = map[string]string{"parity": []string{"even", "odd"}[i%2]}
		ids = append(ids, mustCreate(t, c, req).ID)
	}
	for _, oldest := range []bool{false, true} {
		var got []sandbox.ID
		q := control.ListQuery{Limit: 4, OldestFirst: oldest, Metadata: map[string]string{"parity": "odd"}, Template: "base"}
		for {
			page, err := c.Control.List(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			if page.Running != 12 {
				t.Fatalf("%d running in all", page.Running)
			}
			for _, b := range page.Sandboxes {
				got = append(got, b.ID)
			}
			if q.Next = page.Next; q.Next == "" {
				break
			}
		}
		if len(got) != 12 {
			t.Fatalf("%d listed", len(got))
		}
		for i, id := range got {
			want := ids[23-2*i]
			if oldest {
				want = ids[1+2*i]
			}
			if id != want {
				t.Errorf("oldest first %v: entry %d is %s, want %s", oldest, i, id, want)
			}
		}
	}
	box, _ := c.Control.Get(t.Context(), ids[20])
	for _, oldest := range []bool{false, true} {
		page, err := c.Control.List(t.Context(), control.ListQuery{StartedAfter: box.StartedAt, OldestFirst: oldest})
		if err != nil || len(page.Sandboxes) != 5 || page.Running != 5 {
			t.Errorf("%d started from then on, %d running, %v", len(page.Sandboxes), page.Running, err)
		}
	}
	bad := []control.ListQuery{{Limit: -1}, {Limit: 5000}, {Next: "x"}, {States: []sandbox.State{"odd"}}, {Template: "a b"}}
	for _, q := range bad {
		if _, err := c.Control.List(t.Context(), q); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", q, err)
		}
	}
	if page, err := c.Control.List(t.Context(), control.ListQuery{Template: "unknown"}); err != nil || len(page.Sandboxes) != 0 {
		t.Errorf("unknown template: %v", err)
	}
}

func TestMetricsAndLogs(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	samples, err := c.Control.Metrics(t.Context(), box.ID, time.Time{}, time.Time{})
	if err != nil || len(samples) != 2 || samples[0].MemoryTotalBytes != 512<<20 {
		t.Errorf("%+v, %v", samples, err)
	}
	now := time.Now()
	if _, err := c.Control.Metrics(t.Context(), box.ID, now, now.Add(-time.Hour)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
	logs, err := c.Control.Logs(t.Context(), box.ID, time.Time{}, 3)
	if err != nil || len(logs) != 3 {
		t.Errorf("%+v, %v", logs, err)
	}
	for _, limit := range []int{0, -1, 1 << 20} {
		if _, err := c.Control.Logs(t.Context(), box.ID, time.Time{}, limit); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("limit %d: %v", limit, err)
		}
	}
}

func TestNodeErrors(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	kinds := map[connect.Code]error{
		connect.CodeInvalidArgument: sandbox.ErrInvalid, connect.CodeResourceExhausted: sandbox.ErrExhausted,
		connect.CodeUnavailable: sandbox.ErrUnavailable, connect.CodeFailedPrecondition: sandbox.ErrConflict,
		connect.CodeUnimplemented: sandbox.ErrUnsupported, connect.CodePermissionDenied: sandbox.ErrDenied,
	}
	for code, kind := range kinds {
		c.Node.Fail(connect.NewError(code, errors.New("because")))
		if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Minute); !errors.Is(err, kind) || !strings.Contains(err.Error(), "because") {
			t.Errorf("%v: %v", code, err)
		}
	}
	c.Node.Fail(sandbox.Conflictf("as it is"))
	if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Minute); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
}

func TestKeys(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	k, secret, err := c.Control.CreateKey(t.Context(), " laptop ")
	if err != nil || k.Name != "laptop" || secret == "" {
		t.Errorf("%+v, %v", k, err)
	}
	for _, name := range []string{"", " ", strings.Repeat("x", 100), "a\x00b"} {
		if _, _, err := c.Control.CreateKey(t.Context(), name); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := c.Control.RevokeKey(t.Context(), k.ID); err != nil {
		t.Error(err)
	}
	if err := c.Control.RevokeKey(t.Context(), k.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

func TestStatus(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	mustCreate(t, c, minute())
	s, err := c.Control.Status(t.Context())
	if err != nil || !s.Ready || s.Nodes[sandbox.NodeReady] != 1 || s.Sandboxes[sandbox.StateRunning] != 1 || s.Templates != 1 ||
		s.Allocated.MilliCPU != 2000 {
		t.Errorf("%+v, %v", s, err)
	}
}

// Creates, kills, reports and lists at once must leave the index saying what the node has.
func TestConcurrentUse(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 50 {
				box, err := c.Control.Create(t.Context(), minute())
				if err != nil {
					t.Error(err)
					return
				}
				if (i+w)%2 == 0 {
					if err := c.Control.Kill(t.Context(), box.ID); err != nil {
						t.Error(err)
					}
				}
				if _, err := c.Control.List(t.Context(), control.ListQuery{Metadata: map[string]string{"a": "b"}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 30 {
			if err := c.Report(t, c.Node, false); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if err := c.Report(t, c.Node, false); err != nil {
		t.Fatal(err)
	}
	page, err := c.Control.List(t.Context(), control.ListQuery{Limit: 1000})
	if err != nil || len(page.Sandboxes) != 200 || page.Running != 200 {
		t.Errorf("%d listed, %d running, %v", len(page.Sandboxes), page.Running, err)
	}
}

func BenchmarkCreate(b *testing.B) {
	c := apitest.NewCluster(b, nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Control.Create(b.Context(), control.CreateRequest{Timeout: time.Minute, Metadata: map[string]string{"a": "b"}}); err != nil {
			b.Fatal(err)
		}
	}
}
