package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"log/slog"
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
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// from makes a request start from a checkpoint.
func from(checkpoint string) func(*agentv1.CreateRequest) {
	return func(r *agentv1.CreateRequest) {
		r.CheckpointId, r.TemplateId, r.TemplateName = checkpoint, "snap", "snap"
	}
}

// demandTokens makes guests demand the token that they were told last, also after they were saved and started elsewhere.
func (m *machine) demandTokens() {
	m.onGuest(func(id sandbox.ID, r *http.Request) (int, string) {
		if r.URL.Path != "/init" {
			return 0, ""
		}
		c, _ := m.host.Contents(id)
		memory, known, _ := strings.Cut(c.Memory, "|")
		if known != "" && known != r.Header.Get("X-Access-Token") {
			return http.StatusUnauthorized, `{"code":401,"message":"wrong token"}`
		}
		var b initBody
		if err := json.NewDecoder(r.Body).Decode(&b); err != nil {
			return http.StatusBadRequest, err.Error()
		}
		m.inits[id] = b
		m.put(id, memory+"|"+cmp.Or(b.AccessToken, known), c.Files)
		return http.StatusNoContent, ""
	})
}

func TestSnapshotAndFork(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		m.demandTokens()
		id := n.create(func(r *agentv1.CreateRequest) {
			r.Guest = &agentv1.GuestSettings{Env: map[string]string{"G": "1"}, User: "someone", Workdir: "/work"}
		})
		m.put(id, "mem|"+m.init(id).AccessToken, "disk")
		c, err := n.save(id, "snap-1", kindMemory)
		m.check(err)
		if c.GetId() != "snap-1" || c.GetKind() != kindMemory || c.GetImageDigest() != digestOf("one") || c.GetSandboxId() != string(id) ||
			c.GetBytes() == 0 || c.GetCreatedAt() == nil || c.GetGuest().GetUser() != "someone" || c.GetGuest().GetEnv()["A"] != "1" {
			t.Errorf("checkpoint: %v", c)
		}
		if m.host.Still(id) {
			t.Error("the source stands still")
		}
		if _, err := n.save(id, "snap-1", kindMemory); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("saved twice under one id: %v", err)
		}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				fork := n.create(from("snap-1"), func(r *agentv1.CreateRequest) { r.Secure = false })
				if got := m.holds(fork); got != "mem/disk" {
					t.Errorf("a fork holds %q", got)
				}
				in, _ := n.get(fork)
				if b := m.init(fork); b.AccessToken != sandbox.AccessToken(m.server.secret, fork) || b.SandboxID != string(fork) || b.EnvVars["A"] != "1" ||
					!in.record().Secure {
					t.Errorf("init: %+v", b)
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if got := m.server.types(id); got != "created started snapshotted" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		for name, c := range map[string]struct {
			change func(*agentv1.CreateRequest)
			code   connect.Code
		}{
			"unknown":    {func(r *agentv1.CreateRequest) { r.CheckpointId = "snap-2" }, connect.CodeNotFound},
			"impossible": {func(r *agentv1.CreateRequest) { r.CheckpointId = "../x" }, connect.CodeInvalidArgument},
			"image":      {func(r *agentv1.CreateRequest) { r.ImageDigest = digestOf("two") }, connect.CodeInvalidArgument},
			"size":       {func(r *agentv1.CreateRequest) { r.Resources.MemoryBytes *= 2 }, connect.CodeInvalidArgument},
		} {
			req := request()
			req.CheckpointId = "snap-1"
			c.change(req)
			if _, err := n.Create(t.Context(), req); connect.CodeOf(err) != c.code {
				t.Errorf("%s: %v, want code %v", name, err, c.code)
			}
		}
		n.verify()
	})
}

func TestSnapshotOfFiles(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		_, err := n.save(id, "files", kindFiles)
		m.check(err)
		fork := n.create(from("files"), func(r *agentv1.CreateRequest) { r.Secure, r.Resources = false, toWireResources(times(small(), 2)) })
		if got := m.holds(fork); got != "/disk" {
			t.Errorf("it holds %s", got)
		}
		if b := m.init(fork); b.AccessToken != "" {
			t.Error("it demands a token")
		}
		n.verify()
	})
}

func TestSnapshotOfAPausedOne(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		m.check(n.pauseIt(id, kindMemory))
		_, err := n.save(id, "snap", kindMemory)
		m.check(err)
		if _, err := n.save(id, "snap2", kindFiles); connect.CodeOf(err) != connect.CodeUnimplemented {
			t.Errorf("its files alone: %v", err)
		}
		if sum := n.saves.Bytes(); sum != n.saves.List()[0].Bytes {
			t.Errorf("shared files count twice: %d", sum)
		}
		m.check(n.kill(id))
		n.verify()
		if got := m.holds(n.create(from("snap"))); got != "mem/disk" {
			t.Errorf("a fork holds %s", got)
		}
		n.verify()
	})
}

func TestSnapshotThatFails(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.host.OnSave(func(sandbox.ID, engine.SaveSpec) error { return errTest })
		if _, err := n.save(id, "snap", kindMemory); !errors.Is(err, errTest) {
			t.Errorf("snapshot: %v", err)
		}
		m.host.OnSave(nil)
		_, err := n.save(id, "snap", kindMemory)
		m.check(err)
		if got := n.state(id); got != "running" {
			t.Errorf("state: %s", got)
		}
		n.verify()
	})
}

func TestRollback(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id, other := n.create(), n.create()
		m.put(id, "old", "old")
		_, err := n.save(id, "mine", kindMemory)
		m.check(err)
		_, err = n.save(other, "others", kindMemory)
		m.check(err)
		m.put(id, "new", "new")
		for checkpoint, code := range map[string]connect.Code{
			"others": connect.CodeInvalidArgument, "unknown": connect.CodeNotFound, "?": connect.CodeInvalidArgument,
		} {
			if err := n.rewind(id, checkpoint); connect.CodeOf(err) != code {
				t.Errorf("to %s: %v", checkpoint, err)
			}
		}
		end := n.end(id)
		conn, err := n.DialGuest(t.Context(), id, 80)
		m.check(err)
		m.check(n.rewind(id, "mine"))
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("an open connection went on")
		}
		if got := m.holds(id); got != "old/old" || n.state(id) != "running" || !n.end(id).Equal(end) {
			t.Errorf("it holds %s, is %s, ends %v; ended %v before", got, n.state(id), n.end(id), end)
		}
		n.verify()
		m.put(id, "newer", "newer")
		m.check(n.pauseIt(id, kindMemory))
		pass(time.Hour)
		m.check(n.rewind(id, "mine"))
		if got := m.holds(id); got != "old/old" || n.state(id) != "running" {
			t.Errorf("it holds %s, is %s", got, n.state(id))
		}
		synctest.Wait()
		if got := m.server.types(id); got != "created started snapshotted rolled_back paused rolled_back" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		if err := m.host.OOM(id); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := n.state(id); !strings.HasPrefix(got, "failed: out of memory") {
			t.Errorf("the end of the second guest was not seen: %s", got)
		}
	})
}

// end returns when a sandbox is to end.
func (n *node) end(id sandbox.ID) time.Time {
	in, _ := n.get(id)
	return in.record().EndAt
}

func TestRollbackThatFails(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id, paused := n.create(func(r *agentv1.CreateRequest) { r.Timeout = nil }), n.create()
		for _, b := range []sandbox.ID{id, paused} {
			m.put(b, "old", "old")
			_, err := n.save(b, "of-"+string(b), kindMemory)
			m.check(err)
			m.put(b, "new", "new")
		}
		m.check(n.pauseIt(paused, kindMemory))
		fail := func(engine.Spec) (*engine.Exit, error) { return nil, errTest }
		m.host.OnStart(fail)
		if err := n.rewind(paused, "of-"+string(paused)); err == nil {
			t.Error("rolled back")
		}
		if got := n.state(paused); got != "paused" {
			t.Errorf("a paused one: %s", got)
		}
		if err := n.rewind(id, "of-"+string(id)); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("rollback: %v", err)
		}
		if got := n.state(id); got != "resuming" {
			t.Errorf("state: %s", got)
		}
		pass(time.Second)
		m.host.OnStart(nil)
		pass(time.Minute)
		if got := m.holds(id); got != "old/old" || n.state(id) != "running" {
			t.Errorf("it holds %s, is %s", got, n.state(id))
		}
		n.verify()
		m.host.OnStart(fail)
		if err := n.rewind(id, "of-"+string(id)); err == nil {
			t.Error("rolled back")
		}
		pass(10 * time.Minute)
		if got := n.state(id); got != "paused" {
			t.Errorf("after its deadline: %s", got)
		}
		if got := m.server.types(id); got != "created started snapshotted rolled_back paused" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		m.host.OnStart(nil)
		for b, want := range map[sandbox.ID]string{id: "old/old", paused: "new/new"} {
			_, err := n.resumeIt(b)
			m.check(err)
			if got := m.holds(b); got != want {
				t.Errorf("it holds %s, want %s", got, want)
			}
		}
		n.verify()
	})
}

func TestRemoveCheckpoint(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		_, err := n.save(id, "snap", kindMemory)
		m.check(err)
		m.check(n.pauseIt(id, kindMemory))
		remove := func(checkpoint string) {
			t.Helper()
			if _, err := n.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: checkpoint}); err != nil {
				t.Error(err)
			}
		}
		remove(n.pauses()[0]) // not the caller's
		n.verify()
		// One that somebody starts from stays until that is done.
		starting := make(chan struct{})
		m.host.OnStart(func(engine.Spec) (*engine.Exit, error) {
			close(starting)
			time.Sleep(time.Second) //nolint:forbidigo // the bubble's clock
			return nil, nil
		})
		var wg sync.WaitGroup
		wg.Go(func() { n.create(from("snap")) })
		<-starting
		remove("snap")
		remove("snap")
		if _, err := n.Create(t.Context(), func() *agentv1.CreateRequest { r := request(); from("snap")(r); return r }()); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("create from a removed one: %v", err)
		}
		wg.Wait()
		if got := len(n.saves.List()); got != 1 {
			t.Errorf("%d checkpoints are left", got)
		}
	})
}

func TestCheckpointsAreRegistered(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		_, err := n.save(id, "snap", kindMemory)
		m.check(err)
		m.check(n.pauseIt(id, kindMemory))
		n.down()
		n = m.boot()
		synctest.Wait()
		m.server.mu.Lock()
		got := strings.Join(m.server.registered.GetCheckpointIds(), " ")
		m.server.mu.Unlock()
		if got != "snap" {
			t.Errorf("registered: %q", got)
		}
		n.verify()
	})
}

func TestWarmPoolsOfCheckpoints(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 4
		n := m.boot()
		m.demandTokens()
		in, err := n.admitBuild(t.Context(), "build-1", digestOf("one"), small())
		m.check(err)
		g, err := n.boot(t.Context(), in)
		m.check(err)
		g.close()
		m.put(in.id, "server", "files")
		pass(time.Hour) // the reconcile loop leaves it to the build
		man, err := n.saveCheckpoint(t.Context(), in, "build-1", engine.SaveSpec{Kind: engine.SaveMemory})
		m.check(err)
		if man.SandboxID != "" || man.Pause {
			t.Errorf("manifest: %+v", man)
		}
		n.abandon(t.Context(), in)
		warm := func() (ready int) {
			for _, in := range n.instances() {
				if r := in.record(); r.Warm && r.Ready && r.Source == "build-1" && m.holds(in.id) == "server/files" {
					ready++
				}
			}
			return ready
		}
		n.create(from("build-1"))
		n.eventually("the pool is filled", func() bool { return warm() == 2 })
		before := map[sandbox.ID]bool{}
		for _, g := range m.guests() {
			before[g] = true
		}
		id := n.create(from("build-1"))
		if !before[id] || m.holds(id) != "server/files" || m.init(id).AccessToken != sandbox.AccessToken(m.server.secret, id) {
			t.Errorf("it was not claimed, or holds %s", m.holds(id))
		}
		n.down()
		n = m.boot()
		synctest.Wait()
		if warm() < 1 {
			t.Error("the warm ones were not adopted")
		}
		// What somebody saved gets warm ones only when it is asked for again and again.
		_, err = n.save(id, "snap", kindMemory)
		m.check(err)
		n.create(from("snap"))
		pass(time.Second)
		for _, in := range n.instances() {
			if r := in.record(); r.Warm && r.Source == "snap" {
				t.Error("a snapshot that was used once has a warm sandbox")
			}
		}
		for range 4 {
			n.create(from("snap"))
		}
		n.eventually("it has warm ones", func() bool {
			for _, in := range n.instances() {
				if r := in.record(); r.Warm && r.Ready && r.Source == "snap" {
					return true
				}
			}
			return false
		})
		fork := n.create(from("snap"))
		if got := m.init(fork).AccessToken; got != sandbox.AccessToken(m.server.secret, fork) || n.state(fork) != "running" {
			t.Errorf("a claimed fork: %s", n.state(fork))
		}
		for _, c := range []string{"build-1", "snap"} {
			_, err := n.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: c})
			m.check(err)
		}
		n.eventually("all are given back", func() bool { ready, filling := n.warmCount(); return ready+filling == 0 })
		synctest.Wait()
		n.verify()
	})
}

// TestRemovedTemplateIsLeftAlone checks that a pool of a template that is gone does not try again and again, also after a restart.
func TestRemovedTemplateIsLeftAlone(t *testing.T) {
	for name, c := range map[string]struct{ before, after bool }{
		"at once": {}, "before a restart": {after: true}, "after a restart": {before: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *machine) {
				t := m.t
				var log strings.Builder
				var mu sync.Mutex
				m.logger = slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
					mu.Lock()
					defer mu.Unlock()
					return log.Write(p)
				}), &slog.HandlerOptions{Level: slog.LevelWarn}))
				m.cfg.WarmMin, m.cfg.WarmMax = 2, 4
				n := m.boot()
				n.build(template, "two")
				synctest.Wait()
				id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digestOf("two") })
				n.eventually("the pool is filled", func() bool { ready, _ := n.warmCount(); return ready == 2 })
				m.check(n.kill(id))
				if c.before {
					pass(15 * time.Minute) // nothing but warm ones says what was asked for
					n.down()
					n = m.boot()
				}
				_, err := n.RemoveTemplate(t.Context(), &agentv1.RemoveTemplateRequest{TemplateId: template, ImageDigest: digestOf("two")})
				m.check(err)
				pass(time.Minute)
				if c.after {
					n.down()
					n = m.boot()
				}
				pass(30 * time.Minute)
				mu.Lock()
				defer mu.Unlock()
				if log.String() != "" {
					t.Errorf("logged:\n%.1000s", log.String())
				}
				if _, err := m.images.Path(digestOf("two")); err == nil {
					t.Error("the image is still there")
				}
				n.verify()
			})
		})
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestImagesInUse checks that an image goes when its last user does, whichever that is.
func TestImagesInUse(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		n.build("t1", "two")
		synctest.Wait()
		id := n.create(func(r *agentv1.CreateRequest) {
			r.TemplateId, r.ImageDigest, r.Timeout = "t1", digestOf("two"), durationpb.New(time.Minute)
		})
		_, err := n.save(id, "snap", kindMemory)
		m.check(err)
		m.check(n.pauseIt(id, kindMemory))
		_, err = n.RemoveTemplate(t.Context(), &agentv1.RemoveTemplateRequest{TemplateId: "t1", ImageDigest: digestOf("two")})
		m.check(err)
		there := func() bool { _, err := m.images.Path(digestOf("two")); return err == nil }
		pass(time.Hour)
		if !there() {
			t.Fatal("the image of a paused sandbox was deleted")
		}
		_, err = n.resumeIt(id)
		m.check(err)
		m.check(n.kill(id))
		n.down()
		n = m.boot()
		pass(time.Hour)
		if !there() {
			t.Fatal("the image of a checkpoint was deleted")
		}
		n.create(from("snap"), func(r *agentv1.CreateRequest) {
			r.ImageDigest, r.Timeout = digestOf("two"), durationpb.New(time.Minute)
		})
		_, err = n.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: "snap"})
		m.check(err)
		pass(time.Second)
		if !there() {
			t.Fatal("the image of a running sandbox was deleted")
		}
		pass(2 * time.Minute)
		if there() {
			t.Error("the image is still there")
		}
		if ims, err := n.jour.Images(t.Context()); err != nil || len(ims) != 0 {
			t.Errorf("images: %v, %v", ims, err)
		}
		n.verify()
	})
}
