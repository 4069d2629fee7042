package agent

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
)

func (n *node) build(template string, sources ...string) string {
	n.m.t.Helper()
	resp, err := n.Build(context.Background(), &agentv1.BuildRequest{TemplateId: template, Sources: sources})
	if err != nil {
		n.m.t.Fatal(err)
	}
	return resp.GetBuildId()
}

func (n *node) getBuild(id string, offset int, wait time.Duration) *agentv1.GetBuildResponse {
	n.m.t.Helper()
	resp, err := n.GetBuild(context.Background(), &agentv1.GetBuildRequest{
		BuildId: id, Offset: int32(offset), Wait: durationpb.New(wait),
	})
	if err != nil {
		n.m.t.Fatal(err)
	}
	return resp
}

func TestBuild(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		step := make(chan image.Progress)
		m.images.build = func(ctx context.Context, _ image.Request, progress func(image.Progress)) (image.Image, error) {
			for p := range step {
				progress(p)
			}
			return m.images.add("three"), ctx.Err()
		}
		id := n.build("t1", "three")
		if again := n.build("t1", "three"); again != id {
			t.Errorf("a second build of the same template: %s", again)
		}
		synctest.Wait()
		began := time.Now()
		if b := n.getBuild(id, 0, 7*time.Second); b.GetState() != agentv1.BuildState_BUILD_STATE_BUILDING || time.Since(began) != 7*time.Second {
			t.Errorf("nothing new for 7 s: %v after %v", b, time.Since(began))
		}
		go func() {
			pass(time.Second)
			step <- image.Progress{Step: "pull", Fraction: 0.25, Message: "pulling"}
		}()
		began = time.Now()
		b := n.getBuild(id, 0, time.Minute)
		if time.Since(began) != time.Second || b.GetStep() != "pull" || b.GetProgress() != 0.25 || len(b.GetEntries()) != 1 {
			t.Errorf("after a line: %v after %v", b, time.Since(began))
		}
		go func() {
			step <- image.Progress{Step: "pull", Fraction: 0.2501} // too little to wake anybody
			pass(time.Second)
			step <- image.Progress{Step: "pull", Fraction: 0.5}
		}()
		if b := n.getBuild(id, 1, time.Minute); b.GetProgress() != 0.5 || len(b.GetEntries()) != 0 {
			t.Errorf("after progress: %v", b)
		}
		close(step)
		synctest.Wait()
		b = n.getBuild(id, 1, time.Minute)
		if b.GetState() != agentv1.BuildState_BUILD_STATE_READY || b.GetImageDigest() != digestOf("three") || b.GetSource() != "three" ||
			b.GetProgress() != 1 || len(b.GetEntries()) != 1 {
			t.Errorf("at the end: %v", b)
		}
		ims, err := n.jour.Images(t.Context())
		if err != nil || len(ims) != 1 || ims[0].TemplateID != "t1" {
			t.Errorf("images: %v, %v", ims, err)
		}
		n.down()
		n = m.boot()
		if _, err := n.GetBuild(t.Context(), &agentv1.GetBuildRequest{BuildId: id}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("a build of an earlier process: %v", err)
		}
		if ims, err := n.jour.Images(t.Context()); err != nil || len(ims) != 1 || len(ims[0].Templates) != 1 || ims[0].Removed {
			t.Error("the template's image is forgotten")
		}
	})
}

func TestBuildFails(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		m.images.build = func(_ context.Context, _ image.Request, progress func(image.Progress)) (image.Image, error) {
			for i := range 2 * maxBuildEntries {
				progress(image.Progress{Message: strconv.Itoa(i)})
			}
			return image.Image{}, errTest
		}
		id := n.build("t1", "x")
		synctest.Wait()
		b := n.getBuild(id, 0, 0)
		last := len(b.GetEntries()) - 1
		if b.GetState() != agentv1.BuildState_BUILD_STATE_FAILED || b.GetError() != errTest.Error() || last != maxBuildEntries ||
			!strings.Contains(b.GetEntries()[last].GetMessage(), errTest.Error()) {
			t.Errorf("build: %v, %q, %d entries", b.GetState(), b.GetError(), last+1)
		}
		for range maxBuilds + 5 {
			n.build("t1", "x")
			synctest.Wait()
		}
		if got := len(n.builds.byID); got != maxBuilds {
			t.Errorf("%d builds are kept", got)
		}
		for name, req := range map[string]*agentv1.BuildRequest{
			"template":  {TemplateId: "A", Sources: []string{"x"}},
			"no source": {TemplateId: "a"},
			"no text":   {TemplateId: "a", Sources: []string{""}},
			"many":      {TemplateId: "a", Sources: make([]string, 99)},
			"long":      {TemplateId: "a", Sources: []string{strings.Repeat("x", 5000)}},
		} {
			if _, err := n.Build(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := n.GetBuild(t.Context(), &agentv1.GetBuildRequest{BuildId: id, Offset: -1}); err == nil {
			t.Error("a negative offset")
		}
	})
}

func TestRemoveTemplate(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		n.build("t1", "same")
		n.build("t2", "same")
		synctest.Wait()
		remove := func(template string) {
			t.Helper()
			_, err := n.RemoveTemplate(t.Context(), &agentv1.RemoveTemplateRequest{TemplateId: template, ImageDigest: digestOf("same")})
			if err != nil {
				t.Fatal(err)
			}
		}
		remove("t1")
		if _, err := m.images.Path(digestOf("same")); err != nil {
			t.Errorf("an image that another template has: %v", err)
		}
		remove("t2")
		if _, err := m.images.Path(digestOf("same")); err == nil {
			t.Error("the image is still there")
		}
		remove("t2")
		if ims, err := n.jour.Images(t.Context()); err != nil || len(ims) != 0 {
			t.Errorf("images: %v, %v", ims, err)
		}
	})
}
