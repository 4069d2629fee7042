package agent

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
)

// recipe is a build with every kind of step.
func withSteps(id string) *agentv1.BuildRequest {
	return &agentv1.BuildRequest{
		TemplateId: "t1", BuildId: id, Resources: toWireResources(small()), BaseImageDigest: digestOf("one"),
		BaseGuest: &agentv1.GuestSettings{Env: map[string]string{"BASE": "b"}},
		Steps: []*agentv1.BuildStep{
			{Type: "ENV", Args: []string{"A", "$BASE/1"}},
			{Type: "RUN", Args: []string{"make"}},
			{Type: "USER", Args: []string{"app"}},
			{Type: "WORKDIR", Args: []string{"/srv"}},
			{Type: "COPY", Args: []string{"a.txt", "sub/$A/", "", "0644"}, FilesHash: "h1"},
			{Type: "RUN", Args: []string{"make install", "root"}},
		},
	}
}

func (n *node) ask(req *agentv1.BuildRequest) string {
	n.m.t.Helper()
	resp, err := n.Build(context.Background(), req)
	if err != nil {
		n.m.t.Fatal(err)
	}
	return resp.GetBuildId()
}

// await waits for a build's end.
func (n *node) await(id string) *agentv1.GetBuildResponse {
	n.m.t.Helper()
	for from := 0; ; {
		b := n.getBuild(id, from, time.Minute)
		if b.GetState() != agentv1.BuildState_BUILD_STATE_BUILDING {
			return n.getBuild(id, 0, 0)
		}
		from = int(b.GetEntriesTotal())
	}
}

func (n *node) upload(hash string) {
	n.m.t.Helper()
	resp, err := n.PutFile(context.Background(), &agentv1.PutFileRequest{Hash: hash, Data: tarball(n.m.t), Complete: true})
	if err != nil || !resp.GetComplete() {
		n.m.t.Fatalf("upload: %v, %v", resp, err)
	}
}

func TestBuildSteps(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		s := newShop(m)
		n := m.boot()
		n.upload("h1")
		s.do = func(c ran) result {
			text := c.Cfg.GetArgs()[len(c.Cfg.GetArgs())-1]
			s.writes(c, "after "+text)
			return result{stdout: "one\r\ntwo", stderr: "oops\n"}
		}
		b := n.await(n.ask(withSteps("b-1")))
		if b.GetState() != agentv1.BuildState_BUILD_STATE_READY || b.GetProgress() != 1 {
			t.Fatalf("%v", b)
		}
		want := []string{
			"/bin/bash -l -c: make as user",
			`account {"user":"app"}`,
			"mkdir /srv as app",
			"copy dest=sub%2Fb%2F1%2F&mode=0644&src=a.txt&user=app&workdir=%2Fsrv: 137 bytes",
			"/bin/bash -l -c: make install as root",
		}
		got := s.took()
		got[3] = got[3][:strings.LastIndex(got[3], ":")] + ": 137 bytes"
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("asked (-want +got):\n%s", diff)
		}
		for _, line := range []string{
			"1 info: building step 1/6: ENV A $BASE/1", "2 info: building step 2/6: RUN make", "2 info: one", "2 info: two", "2 error: oops",
			"6 info: building step 6/6: RUN make install root", "finalize info: the template is ready",
		} {
			if !has(messages(b), line) {
				t.Errorf("no line %q in %q", line, messages(b))
			}
		}
		env := map[string]string{"BASE": "b", "A": "b/1"}
		if diff := cmp.Diff(env, b.GetGuest().GetEnv()); diff != "" || b.GetGuest().GetUser() != "app" || b.GetGuest().GetWorkdir() != "/srv" {
			t.Errorf("guest %v", b.GetGuest())
		}
		last := m.images.composed[len(m.images.composed)-1]
		if layers := strings.Fields(last); len(layers) != 3 || b.GetImageDigest() != digestOf(last) {
			t.Errorf("composed of %q", last)
		}
		n.verify()
		// The same once more needs no sandbox, and a later change runs only what follows it.
		before := len(m.images.composed)
		again := n.await(n.ask(withSteps("b-2")))
		if again.GetImageDigest() != b.GetImageDigest() || len(s.took()) != 0 || len(m.images.composed) != before+1 {
			t.Errorf("the same again: %v", messages(again))
		}
		if !has(messages(again), "6 info: CACHED building step 6/6") {
			t.Errorf("log: %q", messages(again))
		}
		changed := withSteps("b-3")
		changed.Steps[5].Args[0] = "make check"
		n.await(n.ask(changed))
		if diff := cmp.Diff([]string{"/bin/bash -l -c: make check as root"}, s.took()); diff != "" {
			t.Errorf("after a change:\n%s", diff)
		}
		forced := withSteps("b-4")
		forced.Steps[4].Force = true
		n.await(n.ask(forced))
		if got := s.took(); len(got) != 2 {
			t.Errorf("a forced step: %q", got)
		}
		all := withSteps("b-5")
		all.Force = true
		n.await(n.ask(all))
		if got := s.took(); len(got) != 5 {
			t.Errorf("all forced: %q", got)
		}
		n.verify()
	})
}

func TestBuildStepFails(t *testing.T) {
	for name, test := range map[string]struct {
		change func(s *shop, req *agentv1.BuildRequest)
		step   string
		want   string
	}{
		"command": {
			func(s *shop, _ *agentv1.BuildRequest) {
				s.do = func(ran) result { return result{stderr: "no\n", code: 2} }
			},
			"2", "failed to run command 'make': exit status 2",
		},
		"files": {
			func(_ *shop, req *agentv1.BuildRequest) { req.Steps[4].FilesHash = "h2" },
			"5", "the files of the step were not uploaded, or removed since (hash h2): upload them again",
		},
		"base": {func(_ *shop, req *agentv1.BuildRequest) { req.BaseImageDigest = digestOf("none") }, "base", ""},
		"dead": {func(s *shop, _ *agentv1.BuildRequest) {
			s.do = func(c ran) result { _ = s.m.host.OOM(c.ID); return result{} }
		}, "2", ""},
		"start": {func(_ *shop, req *agentv1.BuildRequest) { req.StartCommand = "x" }, "finalize", ""},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *machine) {
				s := newShop(m)
				n := m.boot()
				n.upload("h1")
				req := withSteps("")
				if name == "start" {
					s.do = func(c ran) result {
						if c.Cfg.GetArgs()[2] == "x" {
							return result{code: 1}
						}
						return result{}
					}
				}
				test.change(s, req)
				b := n.await(n.ask(req))
				if b.GetState() != agentv1.BuildState_BUILD_STATE_FAILED || b.GetFailedStep() != test.step || test.want != "" && b.GetError() != test.want {
					m.t.Errorf("step %q, error %q", b.GetFailedStep(), b.GetError())
				}
				n.verify()
				if left, _ := filepath.Glob(filepath.Join(m.cfg.FilesDir, layersDir, "*")); len(left) != 0 {
					m.t.Errorf("left: %q", left)
				}
			})
		})
	}
}

func TestBuildWithoutBash(t *testing.T) {
	bubble(t, func(m *machine) {
		s := newShop(m)
		s.noSh = true
		n := m.boot()
		req := withSteps("")
		req.Steps = req.Steps[1:2]
		n.await(n.ask(req))
		if diff := cmp.Diff([]string{"/bin/sh -c: make as user"}, s.took()); diff != "" {
			m.t.Error(diff)
		}
	})
}

// TestBuildOfPushed builds from an image that a template was pushed to: its commands and size come along, unless the
// request says something else.
func TestBuildOfPushed(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		s := newShop(m)
		n := m.boot()
		over := make(chan struct{})
		defer close(over)
		s.do = func(c ran) result {
			if strings.HasPrefix(c.Cfg.GetArgs()[2], "serve") {
				return result{wait: over}
			}
			return result{}
		}
		labels := map[string]string{
			image.LabelStart: "serve", image.LabelReady: "ready", image.LabelCPU: "700", image.LabelMemory: "x", image.LabelDisk: "-1",
		}
		m.images.build = func(_ context.Context, r image.Request, _ func(image.Progress)) (image.Image, error) {
			im := m.images.add(r.Sources[0])
			im.Config.Labels = labels
			return im, nil
		}
		size := small()
		req := &agentv1.BuildRequest{TemplateId: "t1", BuildId: "b-1", Sources: []string{"registry/app"}, Resources: toWireResources(size), DefaultResources: true}
		b := n.await(n.ask(req))
		size.MilliCPU = 700
		if b.GetCheckpoint().GetId() != "b-1" || b.GetStartCommand() != "serve" || b.GetReadyCommand() != "ready" ||
			fromWireResources(b.GetResources()) != size {
			t.Errorf("as pushed: %v", b)
		}
		req.BuildId, req.StartCommand, req.ReadyCommand, req.DefaultResources = "b-2", "serve more", "true", false
		b = n.await(n.ask(req))
		if b.GetStartCommand() != "serve more" || b.GetReadyCommand() != "true" || fromWireResources(b.GetResources()) != small() {
			t.Errorf("as asked for: %v", b)
		}
		labels[image.LabelStart] = strings.Repeat("x", maxCommandBytes+1)
		req.BuildId, req.StartCommand, req.Sources = "b-3", "", []string{"registry/odd"}
		if b = n.await(n.ask(req)); b.GetFailedStep() != "base" || !strings.Contains(b.GetError(), "command of") {
			t.Errorf("with a label that is too long: %v", b)
		}
		n.verify()
	})
}

func TestBuildStartCommand(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		s := newShop(m)
		n := m.boot()
		over := make(chan struct{})
		tries := 0
		s.do = func(c ran) result {
			switch c.Cfg.GetArgs()[2] {
			case "serve":
				return result{wait: over}
			case "ready":
				if tries++; tries < 3 {
					return result{code: 1}
				}
			}
			return result{}
		}
		req := withSteps("b-1")
		req.Steps, req.StartCommand, req.ReadyCommand = req.Steps[:2], "serve", "ready"
		b := n.await(n.ask(req))
		c := b.GetCheckpoint()
		if b.GetState() != agentv1.BuildState_BUILD_STATE_READY || tries != 3 || c.GetId() != "b-1" || c.GetImageDigest() != b.GetImageDigest() ||
			c.GetKind() != agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY || c.GetSandboxId() != "" {
			t.Fatalf("after %d tries: %v", tries, b)
		}
		n.verify()
		s.took()
		req.BuildId = "b-2"
		b = n.await(n.ask(req))
		if b.GetCheckpoint().GetId() != "b-2" || len(s.took()) != 0 || !has(messages(b), "CACHED start command: serve") {
			t.Errorf("the same again: %v", b)
		}
		if _, err := n.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: "b-1"}); err != nil {
			t.Fatal(err)
		}
		req.BuildId, req.Force = "b-3", true
		if b = n.await(n.ask(req)); b.GetCheckpoint().GetId() != "b-3" || len(s.took()) == 0 {
			t.Errorf("forced: %v", b)
		}
		req.BuildId, req.Force, req.ReadyCommand = "b-4", false, ""
		began := time.Now()
		if b = n.await(n.ask(req)); b.GetCheckpoint().GetId() != "b-4" || time.Since(began) < readyDefault {
			t.Errorf("without a ready command: %v after %v", b, time.Since(began))
		}
		req.BuildId, req.ReadyCommand = "b-5", "never"
		s.do = func(c ran) result {
			if c.Cfg.GetArgs()[2] == "never" {
				return result{code: 1}
			}
			return result{wait: over}
		}
		if b = n.await(n.ask(req)); b.GetFailedStep() != "finalize" || b.GetError() != "ready command timed out after 5m0s" {
			t.Errorf("never ready: %v", b)
		}
		n.verify()
		close(over)
	})
}

func TestCancelBuild(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		s := newShop(m)
		n := m.boot()
		over := make(chan struct{})
		s.do = func(ran) result { return result{wait: over} }
		cancel := func(id string) error {
			_, err := n.CancelBuild(t.Context(), &agentv1.CancelBuildRequest{BuildId: id})
			return err
		}
		id := n.ask(withSteps("b-1"))
		synctest.Wait()
		if len(m.guests()) != 1 {
			t.Fatalf("guests: %v", m.guests())
		}
		if err := cancel(id); err != nil {
			t.Fatal(err)
		}
		b := n.getBuild(id, 0, 0)
		if b.GetState() != agentv1.BuildState_BUILD_STATE_FAILED || b.GetError() != "cancelled" || b.GetFailedStep() != "2" {
			t.Errorf("cancelled: %v", b)
		}
		n.verify()
		if err := cancel(id); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("once more: %v", err)
		}
		if err := cancel("none"); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("unknown: %v", err)
		}
		// A killed node leaves nothing of a build either.
		n.ask(withSteps("b-2"))
		synctest.Wait()
		if len(m.guests()) != 1 {
			t.Fatalf("guests: %v", m.guests())
		}
		n.down()
		n = m.boot()
		n.verify()
		if _, err := n.GetBuild(t.Context(), &agentv1.GetBuildRequest{BuildId: "b-2"}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("a build of an earlier process: %v", err)
		}
		close(over)
	})
}

func TestBuildsInLine(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		s := newShop(m)
		m.cfg.MaxBuilds = 2
		n := m.boot()
		over := make(chan struct{})
		s.do = func(ran) result { return result{wait: over} }
		for _, id := range []string{"b-1", "b-2", "b-3"} {
			req := withSteps(id)
			req.Force = true
			req.Steps = req.Steps[:2]
			if got := n.ask(req); got != id {
				t.Errorf("build %s is %s", id, got)
			}
			n.ask(req) // joins
			synctest.Wait()
		}
		if len(m.guests()) != 2 || !has(messages(n.getBuild("b-3", 0, 0)), "waiting: 2 builds are under way") {
			t.Errorf("%d guests, %v", len(m.guests()), messages(n.getBuild("b-3", 0, 0)))
		}
		b, err := n.GetBuild(t.Context(), &agentv1.GetBuildRequest{BuildId: "b-1", Limit: 1})
		if err != nil || len(b.GetEntries()) != 1 || b.GetEntriesTotal() != 2 {
			t.Errorf("limited: %v, %v", b, err)
		}
		close(over)
		for _, id := range []string{"b-1", "b-2", "b-3"} {
			if b := n.await(id); b.GetState() != agentv1.BuildState_BUILD_STATE_READY {
				t.Errorf("%v", b)
			}
		}
		n.verify()
	})
}

func TestBuildLogIsBounded(t *testing.T) {
	bubble(t, func(m *machine) {
		s := newShop(m)
		n := m.boot()
		s.do = func(ran) result { return result{stderr: strings.Repeat("x\n", 2*maxBuildEntries), code: 1} }
		req := withSteps("b-1")
		b := n.await(n.ask(req))
		last := len(b.GetEntries()) - 1
		if last != maxBuildEntries || !strings.Contains(b.GetEntries()[last].GetMessage(), "build failed") {
			m.t.Errorf("%d lines, the last: %v", last+1, b.GetEntries()[last])
		}
	})
}

func TestPush(t *testing.T) {
	bubble(t, func(m *machine) {
		n := m.boot()
		_, err := n.Push(m.t.Context(), &agentv1.PushRequest{
			BuildId: "p-1", TemplateId: "t1", ImageDigest: digestOf("one"), Destination: "oci:/x", StartCommand: "serve",
			Guest: &agentv1.GuestSettings{User: "app"},
		})
		if err != nil {
			m.t.Fatal(err)
		}
		b := n.await("p-1")
		if b.GetState() != agentv1.BuildState_BUILD_STATE_READY || len(m.images.pushed) != 1 || m.images.pushed[0].User != "app" ||
			m.images.pushed[0].StartCommand != "serve" || !has(messages(b), "pushed to oci:/x") {
			m.t.Errorf("%v, %v", b, m.images.pushed)
		}
		for _, bad := range []*agentv1.PushRequest{
			{BuildId: "p", ImageDigest: "x", Destination: "x"}, {ImageDigest: digestOf("one"), Destination: "x"}, {BuildId: "p", ImageDigest: digestOf("one")},
		} {
			if _, err := n.Push(m.t.Context(), bad); connect.CodeOf(err) != connect.CodeInvalidArgument {
				m.t.Errorf("%v: %v", bad, err)
			}
		}
	})
}

func FuzzOutputLines(f *testing.F) {
	f.Add([]byte("a\nb\r\nc"), []byte("\xff\r\r\n"))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		total := 0
		l := &lines{level: "info", out: func(_, line string) {
			if strings.ContainsRune(line, '\n') || len(line) > 3*maxOutputLine || strings.TrimSpace(line) == "" {
				t.Errorf("line %q", line)
			}
			total++
		}}
		l.write(one)
		l.write(two)
		l.flush()
		if most := bytes.Count(one, []byte("\n")) + bytes.Count(two, []byte("\n")) + 1 + (len(one)+len(two))/maxOutputLine; total > most {
			t.Errorf("%d lines of at most %d", total, most)
		}
	})
}

func TestBuildFreesWhatItMade(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		s := newShop(m)
		n := m.boot()
		s.do = func(c ran) result {
			s.writes(c, "after "+c.Cfg.GetArgs()[2])
			return result{}
		}
		fetches := 0
		m.images.build = func(context.Context, image.Request, func(image.Progress)) (image.Image, error) {
			fetches++
			return m.images.add("fetched"), nil
		}
		req := withSteps("b-1")
		req.BaseImageDigest, req.BaseGuest, req.Sources, req.Steps = "", nil, []string{"registry.test/x:1"}, req.Steps[1:2]
		first := n.await(n.ask(req))
		req.BuildId = "b-2"
		req.Steps = append(req.Steps, &agentv1.BuildStep{Type: "RUN", Args: []string{"more"}})
		b := n.await(n.ask(req))
		if fetches != 1 || !has(messages(b), "base info: CACHED base image") {
			t.Errorf("%d fetches: %v", fetches, messages(b))
		}
		req.BuildId, req.RegistryUsername = "b-3", "somebody else"
		n.await(n.ask(req))
		req.BuildId, req.RegistryUsername, req.Force = "b-4", "", true
		n.await(n.ask(req))
		if fetches != 3 {
			t.Errorf("%d fetches with other credentials and by force", fetches)
		}
		// Of the first build's image, which the second began with, the template is in need, of the fetched one the next build.
		release := func(digest string) {
			t.Helper()
			if _, err := n.RemoveTemplate(t.Context(), &agentv1.RemoveTemplateRequest{TemplateId: "t1", ImageDigest: digest}); err != nil {
				t.Fatal(err)
			}
		}
		if got := len(m.images.have); got != 4 {
			t.Errorf("%d images", got)
		}
		release(first.GetImageDigest())
		release(b.GetImageDigest())
		n.eventually("only the base is left", func() bool {
			ims, err := m.images.List(t.Context())
			return err == nil && len(ims) == 2
		})
		n.down()
		n = m.boot()
		n.eventually("nothing of builds is left", func() bool {
			ims, err := m.images.List(t.Context())
			return err == nil && len(ims) == 1
		})
	})
}
