package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloister-dev/cloister/internal/engine"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestColdCreate(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		resp, err := n.Create(t.Context(), request())
		if err != nil {
			t.Fatal(err)
		}
		sb := resp.GetSandbox()
		id := sandbox.ID(sb.GetId())
		if id.Node() != n.NodeID() || sb.GetGeneration() != 2 || sb.GetGuestVersion() != "0.6.13" || sb.GetTemplateName() != "base" {
			t.Errorf("sandbox: %v", sb)
		}
		if got := sb.GetEndAt().AsTime().Sub(sb.GetStartedAt().AsTime()); got != 5*time.Minute {
			t.Errorf("ends %v after its start", got)
		}
		if l := resp.GetLoad(); l.GetSandboxes() != 1 || l.GetAllocated().GetMemoryBytes() != 256*mib {
			t.Errorf("load: %v", l)
		}
		b := m.init(id)
		if b.AccessToken != sandbox.AccessToken(m.server.secret, id) || b.EnvVars["A"] != "1" || b.SandboxID != string(id) ||
			b.TemplateID != template || b.DefaultUser != "user" || b.Hostname != string(id) {
			t.Errorf("init: %+v", b)
		}
		spec, _ := m.host.Spec(id)
		if spec.RootFS != "/images/"+digestOf("one") || spec.Limits != small() || spec.Args[0] != "/usr/local/bin/cloister-guest" {
			t.Errorf("spec: %+v", spec)
		}
		if !m.net.policy(id).AllowInternet {
			t.Error("no internet")
		}
		synctest.Wait()
		if got := m.server.types(id); got != "created started" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		if err := n.kill(id); err != nil {
			t.Fatal(err)
		}
		if got := n.state(id); got != "deleted: killed" {
			t.Errorf("state: %s", got)
		}
		if err := n.kill(id); !errors.Is(err, sandbox.ErrNotFound) || connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("second kill: %v", err)
		}
		synctest.Wait()
		if got := m.server.types(id); got != "created started killed" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
	})
}

func TestCreateNotSecureNoInternetNoTimeout(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.Secure, r.AllowInternet, r.Timeout = false, false, nil })
		if b := m.init(id); b.AccessToken != "" {
			t.Error("a token was set")
		}
		if m.net.policy(id).AllowInternet {
			t.Error("internet")
		}
		time.Sleep(2 * time.Hour) //nolint:forbidigo // the bubble's clock
		if got := n.state(id); got != "running" {
			t.Errorf("state: %s", got)
		}
	})
}

func TestCreateRefuses(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		for name, c := range map[string]struct {
			change func(*agentv1.CreateRequest)
			code   connect.Code
		}{
			"digest":      {func(r *agentv1.CreateRequest) { r.ImageDigest = "sha256:../.." }, connect.CodeInvalidArgument},
			"no image":    {func(r *agentv1.CreateRequest) { r.ImageDigest = digestOf("two") }, connect.CodeUnavailable},
			"no memory":   {func(r *agentv1.CreateRequest) { r.Resources.MemoryBytes = 0 }, connect.CodeInvalidArgument},
			"no size":     {func(r *agentv1.CreateRequest) { r.Resources = nil }, connect.CodeInvalidArgument},
			"too large":   {func(r *agentv1.CreateRequest) { r.Resources.MilliCpu = 1e12 }, connect.CodeResourceExhausted},
			"timeout":     {func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(-1) }, connect.CodeInvalidArgument},
			"timeout 0":   {func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(0) }, connect.CodeInvalidArgument},
			"metadata":    {func(r *agentv1.CreateRequest) { r.Metadata["a"] = strings.Repeat("x", 1<<17) }, connect.CodeInvalidArgument},
			"environment": {func(r *agentv1.CreateRequest) { r.Env["a"] = strings.Repeat("x", 1<<21) }, connect.CodeInvalidArgument},
			"key":         {func(r *agentv1.CreateRequest) { r.IdempotencyKey = strings.Repeat("x", 300) }, connect.CodeInvalidArgument},
		} {
			req := request()
			c.change(req)
			if _, err := n.Create(t.Context(), req); connect.CodeOf(err) != c.code {
				t.Errorf("%s: %v, want code %v", name, err, c.code)
			}
		}
		n.verify()
	})
}

func TestCreateBeforeRegistration(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.load()
		if _, err := n.Create(t.Context(), request()); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("create: %v", err)
		}
	})
}

func TestAdmissionIsExact(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.opt.Capacity = times(small(), 3)
		n := m.boot()
		var wg sync.WaitGroup
		var mu sync.Mutex
		codes := map[connect.Code]int{}
		for range 20 {
			wg.Go(func() {
				_, err := n.Create(t.Context(), request())
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					codes[0]++
				} else {
					codes[connect.CodeOf(err)]++
				}
			})
		}
		wg.Wait()
		if codes[0] != 3 || codes[connect.CodeResourceExhausted] != 17 {
			t.Errorf("results: %v", codes)
		}
		n.verify()
	})
}

func TestFiftyAtOnce(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.MaxStarting = 4
		m.cfg.WarmMax = 8
		m.host.SetLatency(100 * time.Millisecond)
		var mu sync.Mutex
		now, most := 0, 0
		m.host.OnStart(func(engine.Spec) (*engine.Exit, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Millisecond) //nolint:forbidigo // the bubble's clock
			mu.Lock()
			now--
			mu.Unlock()
			return nil, nil
		})
		n := m.boot()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { n.create() })
		}
		wg.Wait()
		if most > 4 {
			t.Errorf("%d starts at once, want at most 4", most)
		}
		if got := n.jour.Ledger(); got.Allocated.Sandboxes-got.Warm.Sandboxes != 50 {
			t.Errorf("ledger: %+v", got)
		}
		synctest.Wait()
	})
}

func TestQueueIsBounded(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.MaxStarting, m.cfg.MaxWaiting = 1, 2
		m.host.SetLatency(time.Second)
		n := m.boot()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { n.create() })
		}
		synctest.Wait()
		if waiting, _ := n.gate.waiting(); waiting != 2 {
			t.Errorf("%d wait, want 2", waiting)
		}
		if _, err := n.Create(t.Context(), request()); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("a create beyond the queue: %v", err)
		}
		wg.Wait()
		n.verify()
	})
}

func TestCancelledCreate(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.MaxStarting = 1
		m.host.SetLatency(time.Second)
		n := m.boot()
		for _, after := range []time.Duration{0, time.Millisecond, 500 * time.Millisecond, 1500 * time.Millisecond} {
			ctx, cancel := context.WithTimeout(t.Context(), after)
			var wg sync.WaitGroup
			for range 3 { // one starts, the others wait
				wg.Go(func() {
					if _, err := n.Create(ctx, request()); after < time.Second && connect.CodeOf(err) != connect.CodeDeadlineExceeded {
						t.Errorf("cancelled after %v: %v", after, err)
					}
				})
			}
			wg.Wait()
			cancel()
			n.verify()
		}
	})
}

func TestFailures(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(m *machine)
		want    string
		code    connect.Code
	}{
		"engine": {func(m *machine) {
			m.host.OnStart(func(engine.Spec) (*engine.Exit, error) { return nil, sandbox.Unavailablef("no sentry today") })
		}, "no sentry today", connect.CodeUnavailable},
		"exits": {func(m *machine) {
			m.host.OnStart(func(engine.Spec) (*engine.Exit, error) { return &engine.Exit{Code: 3}, nil })
		}, "exited with code 3", connect.CodeUnavailable},
		"network": {func(m *machine) { m.net.failNext = sandbox.Exhaustedf("no address left") }, "no address left", connect.CodeResourceExhausted},
		"silent":  {func(m *machine) { m.silent = true }, "did not answer within 30s", connect.CodeUnavailable},
		"sick": {func(m *machine) {
			m.onGuest(func(sandbox.ID, *http.Request) (int, string) { return 500, "oh" })
		}, "status 500", connect.CodeUnavailable},
		"init": {func(m *machine) {
			m.onGuest(func(_ sandbox.ID, r *http.Request) (int, string) {
				if r.URL.Path == "/init" {
					return 400, `{"code":400,"message":"bad\u0007 name"}`
				}
				return 0, ""
			})
		}, `refused the settings: "bad\a name"`, connect.CodeInvalidArgument},
		"endless": {func(m *machine) {
			m.onGuest(func(_ sandbox.ID, r *http.Request) (int, string) {
				if r.URL.Path == "/init" {
					return 200, strings.Repeat("x", 1<<20)
				}
				return 0, ""
			})
		}, "more than 1024 bytes", connect.CodeInternal},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *machine) {
				t := m.t
				c.prepare(m)
				n := m.boot()
				_, err := n.Create(t.Context(), request())
				if err == nil || !strings.Contains(err.Error(), c.want) || connect.CodeOf(err) != c.code {
					t.Errorf("create: code %v, %v; want code %v, %q", connect.CodeOf(err), err, c.code, c.want)
				}
				synctest.Wait()
				n.verify()
				if got := n.jour.Ledger().Sequence; got != 0 {
					t.Errorf("%d changes of a sandbox that nobody was told of", got)
				}
			})
		})
	}
}

func TestIdempotency(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.host.SetLatency(time.Second)
		n := m.boot()
		key := func(r *agentv1.CreateRequest) { r.IdempotencyKey = "k1" }
		ids := make([]sandbox.ID, 10)
		var wg sync.WaitGroup
		for i := range ids {
			wg.Go(func() { ids[i] = n.create(key) })
		}
		wg.Wait()
		for _, id := range ids {
			if id != ids[0] {
				t.Errorf("made %s and %s", ids[0], id)
			}
		}
		n.down()
		n = m.boot()
		if id := n.create(key); id != ids[0] {
			t.Errorf("after a restart: made %s again", id)
		}
		if err := n.kill(ids[0]); err != nil {
			t.Fatal(err)
		}
		req := request()
		key(req)
		if _, err := n.Create(t.Context(), req); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("create with the key of an ended sandbox: %v", err)
		}

		// A failed or cancelled create does not use its key up, and the one who waits for it takes over.
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		req.IdempotencyKey = "k2"
		wg.Go(func() {
			if _, err := n.Create(ctx, req); err == nil {
				t.Error("the cancelled create succeeded")
			}
		})
		wg.Go(func() {
			time.Sleep(time.Millisecond) //nolint:forbidigo // the bubble's clock
			n.create(func(r *agentv1.CreateRequest) { r.IdempotencyKey = "k2" })
		})
		wg.Wait()
		n.verify()
	})
}

func TestWarmClaim(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 4
		m.host.SetLatency(50 * time.Millisecond)
		n := m.boot()
		n.create()
		n.eventually("the pool is filled", func() bool { ready, filling := n.warmCount(); return ready >= 2 && filling == 0 })
		m.mu.Lock()
		before := m.dials
		m.mu.Unlock()
		began := time.Now()
		id := n.create(func(r *agentv1.CreateRequest) { r.AllowInternet = false })
		if took := time.Since(began); took != 0 {
			t.Errorf("a claim took %v", took)
		}
		m.mu.Lock()
		if m.dials != before {
			t.Errorf("a claim opened %d connections, want the kept one to be used", m.dials-before)
		}
		m.mu.Unlock()
		if b := m.init(id); b.AccessToken != sandbox.AccessToken(m.server.secret, id) || b.TemplateID != template {
			t.Errorf("init: %+v", b)
		}
		if m.net.policy(id).AllowInternet {
			t.Error("the claimed sandbox has internet")
		}
		synctest.Wait()
		if got := m.server.types(id); got != "created started" {
			t.Errorf("reported: %q", got)
		}
		// Another size goes the cold way.
		began = time.Now()
		n.create(func(r *agentv1.CreateRequest) { r.Resources.MilliCpu = 600 })
		if took := time.Since(began); took < 50*time.Millisecond {
			t.Errorf("another size took %v", took)
		}
	})
}

func TestWarmClaimOfADeadOne(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 2
		n := m.boot()
		n.create()
		n.eventually("the pool is filled", func() bool { ready, _ := n.warmCount(); return ready == 2 })
		var refused sandbox.ID
		m.onGuest(func(id sandbox.ID, r *http.Request) (int, string) {
			if r.URL.Path == "/init" && (refused == "" || refused == id) {
				refused = id
				return 500, "broken"
			}
			return 0, ""
		})
		id := n.create()
		if id == refused {
			t.Error("the broken one was handed out")
		}
		for _, in := range n.instances() { // the pool's last one ends by itself
			if r := in.record(); r.Warm {
				if err := m.host.Crash(in.id); err != nil {
					t.Fatal(err)
				}
			}
		}
		n.create()
		synctest.Wait()
		time.Sleep(time.Second) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		n.verify()
		if got := m.server.types(refused); got != "" {
			t.Errorf("reported of the broken one: %q", got)
		}
	})
}

func TestRealOnesWinOverWarmOnes(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.opt.Capacity = times(small(), 5)
		m.cfg.WarmMin, m.cfg.WarmMax = 4, 4
		m.host.SetLatency(50 * time.Millisecond)
		n := m.boot()
		n.create()
		n.eventually("the ledger is full", func() bool { return n.jour.Ledger().Warm.Sandboxes == 4 })
		if l := m.server.lastLoad(); l.GetAllocated().GetMemoryBytes() != 256*mib {
			t.Errorf("the reported load counts warm ones: %v", l)
		}
		// Of another image, so that none can be claimed: each needs the room of a warm one, ready or being made.
		m.images.add("two")
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digestOf("two"); r.TemplateId = "other" })
			})
		}
		wg.Wait()
		if _, err := n.Create(t.Context(), request()); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("a sixth: %v", err)
		}
		synctest.Wait()
		n.verify()
		if l := n.jour.Ledger(); l.Warm.Sandboxes != 0 || l.Allocated.Sandboxes != 5 {
			t.Errorf("ledger: %+v", l)
		}
	})
}

func TestPoolFollowsTheTemplate(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 4
		n := m.boot()
		n.create()
		warm := func(image string) int {
			count := 0
			for _, in := range n.instances() {
				if r := in.record(); r.Warm && r.Ready && r.ImageDigest == digestOf(image) {
					count++
				}
			}
			return count
		}
		n.eventually("the pool is filled", func() bool { return warm("one") == 2 })
		if _, err := n.Build(t.Context(), &agentv1.BuildRequest{TemplateId: template, Sources: []string{"two"}}); err != nil {
			t.Fatal(err)
		}
		n.eventually("the old image's are given back", func() bool { return warm("one") == 0 })
		n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digestOf("two") })
		n.eventually("the new image's are made", func() bool { return warm("two") == 2 })
		if _, err := n.RemoveTemplate(t.Context(), &agentv1.RemoveTemplateRequest{TemplateId: template, ImageDigest: digestOf("two")}); err != nil {
			t.Fatal(err)
		}
		n.eventually("all are given back", func() bool { return warm("two") == 0 })
		synctest.Wait()
		n.verify()
	})
}

func TestPoolUnderPressure(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		var mu sync.Mutex
		pressure := false
		m.cfg.MemoryPressure = func() bool { mu.Lock(); defer mu.Unlock(); return pressure }
		m.cfg.WarmMin, m.cfg.WarmMax = 1, 8
		n := m.boot()
		for range 6 {
			n.create()
		}
		size := func() int { ready, _ := n.warmCount(); return ready }
		n.eventually("the pool follows demand", func() bool { return size() >= 4 })
		time.Sleep(5 * time.Minute) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		if size() != 1 {
			t.Errorf("%d are warm long after the last demand, want 1", size())
		}
		n.create()
		mu.Lock()
		pressure = true
		mu.Unlock()
		time.Sleep(10 * time.Second) //nolint:forbidigo // the bubble's clock
		synctest.Wait()
		if size() != 0 {
			t.Errorf("%d are warm under pressure", size())
		}
		n.verify()
	})
}

func TestPolicyOfWarm(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 1, 1
		n := m.boot()
		n.create()
		n.eventually("the pool is filled", func() bool { ready, _ := n.warmCount(); return ready == 1 })
		for _, in := range n.instances() {
			if r := in.record(); r.Warm && m.net.policy(in.id) != (guestnet.Policy{AllowInternet: true}) {
				t.Errorf("policy of a warm sandbox: %+v", m.net.policy(in.id))
			} else if r.Warm && n.state(in.id) != fmt.Sprintf("sandbox %s is not on node %s", in.id, n.node) {
				t.Errorf("a warm sandbox can be seen: %s", n.state(in.id))
			}
		}
	})
}
