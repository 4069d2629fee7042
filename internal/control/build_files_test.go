package control_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// running lets Control.Run work until the test ends.
func running(t *testing.T, c *apitest.Cluster) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Control.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// built begins a build of a template and ends it well.
func built(t *testing.T, c *apitest.Cluster, name, digest string) sandbox.Build {
	t.Helper()
	_, b, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: name, Recipe: from("a")})
	if err != nil {
		t.Fatal(err)
	}
	c.Node.FinishBuild(b.ID, digest, "")
	if _, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: b.ID}); err != nil {
		t.Fatal(err)
	}
	return b
}

func copyStep(hash string) recipe.Step {
	return recipe.Step{Type: recipe.Copy, Args: []string{"a", "/b", "", ""}, FilesHash: hash}
}

func TestBuildSendsFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		running(t, c)
		spec := control.BuildSpec{Name: "tools", Recipe: from("a")}
		spec.Steps = []recipe.Step{copyStep("abc"), {Type: recipe.Run, Args: []string{"make"}}, copyStep("abc")}
		_, _, err := c.Control.BuildTemplate(t.Context(), spec)
		if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), "upload them first") {
			t.Errorf("files that are not here: %v", err)
		}
		large := strings.Repeat("0123456789abcdef", 200_000) // more than three parts
		if _, err := c.Control.PutUpload(t.Context(), "abc", int64(len(large)), strings.NewReader(large)); err != nil {
			t.Fatal(err)
		}
		_, b, err := c.Control.BuildTemplate(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if data, complete := c.Node.File("abc"); data != large || !complete {
			t.Errorf("the node has %d bytes, complete: %v", len(data), complete)
		}
		asked := c.Node.Asked()
		if len(asked) != 1 || asked[0].GetBuildId() != b.ID || len(asked[0].GetSteps()) != 3 || asked[0].GetResources().GetMilliCpu() == 0 {
			t.Errorf("asked for %v", asked)
		}
	})
}

func TestBuildSubstitute(t *testing.T) {
	for _, reachable := range []bool{true, false} {
		t.Run(strconv.FormatBool(reachable), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := apitest.NewCluster(t, nil)
				running(t, c)
				if !reachable {
					c.Node.CutOff()
				}
				spec := control.BuildSpec{Name: "tools", Recipe: from("docker://e2bdev/base")}
				spec.Substitute = "base"
				_, b, err := c.Control.BuildTemplate(t.Context(), spec)
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				want := apitest.BaseDigest
				if reachable {
					want = "sha256:f00d"
					c.Node.FinishBuild(c.Node.Asked()[0].GetBuildId(), want, "")
					asleep(time.Second)
				}
				asked := c.Node.Asked()
				if len(asked) != 2 || asked[1].GetBuildId() != b.ID || asked[1].GetBaseImageDigest() != want || len(asked[1].GetSources()) != 0 {
					t.Fatalf("asked for %v", asked)
				}
				got, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: b.ID})
				if err != nil {
					t.Fatal(err)
				}
				var lines []string
				for _, e := range got.Entries {
					lines = append(lines, e.Message)
				}
				if told := strings.Contains(strings.Join(lines, "\n"), "cannot be had (no such host)"); told == reachable || got.Total != len(lines) {
					t.Errorf("%d lines: %q", got.Total, lines)
				}
				var paged []string
				for {
					part, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: b.ID, Offset: int32(len(paged)), Limit: 1})
					if err != nil || len(part.Entries) == 0 {
						break
					}
					paged = append(paged, part.Entries[0].Message)
				}
				if diff := cmp.Diff(lines, paged); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

func TestCancelBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		running(t, c)
		cancelled := func(id string) {
			t.Helper()
			if err := c.Control.CancelBuild(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			asleep(3 * time.Second)
			if b, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: id}); err != nil || b.State != sandbox.BuildFailed || !strings.Contains(b.Error, "cancelled") {
				t.Errorf("%+v, %v", b, err)
			}
			if err := c.Control.CancelBuild(t.Context(), id); !errors.Is(err, sandbox.ErrConflict) {
				t.Errorf("cancelled twice: %v", err)
			}
		}
		_, waiting, err := c.Control.AnnounceBuild(t.Context(), control.BuildSpec{Name: "tools"})
		if err != nil {
			t.Fatal(err)
		}
		cancelled(waiting.ID)
		_, atNode, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: "tools", Recipe: from("a")})
		if err != nil {
			t.Fatal(err)
		}
		cancelled(atNode.ID)
		spec := control.BuildSpec{Name: "tools", Recipe: from("docker://e2bdev/base")}
		spec.Substitute = "base"
		_, preparing, err := c.Control.BuildTemplate(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		cancelled(preparing.ID)
		if err := c.Control.CancelBuild(t.Context(), "nope"); !errors.Is(err, sandbox.ErrNotFound) {
			t.Error(err)
		}
	})
}

func TestAnnouncedBuildExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		running(t, c)
		_, b, err := c.Control.AnnounceBuild(t.Context(), control.BuildSpec{Name: "tools"})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: b.ID}); err != nil || got.State != sandbox.BuildWaiting {
			t.Errorf("%+v, %v", got, err)
		}
		asleep(3 * time.Hour)
		if got := newest(t, c, "tools"); got.State != sandbox.BuildFailed || !strings.Contains(got.Error, "not started") {
			t.Errorf("%+v", got)
		}
		if _, _, err := c.Control.StartBuild(t.Context(), "tools", b.ID, from("a")); !errors.Is(err, sandbox.ErrConflict) {
			t.Error(err)
		}
	})
}

func TestBuildsAtOnce(t *testing.T) {
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.MaxBuilds = 2 })
	var ids []string
	for i := range 2 {
		_, b, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: fmt.Sprint("t", i), Recipe: from("a")})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, b.ID)
	}
	if _, _, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: "t2", Recipe: from("a")}); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("a third build: %v", err)
	}
	c.Node.FinishBuild(ids[0], "sha256:1", "")
	if _, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: ids[0]}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Control.PushTemplate(t.Context(), control.PushRequest{Template: "t0", Destination: "r/x"}); err != nil {
		t.Errorf("after one of them: %v", err)
	}
}

func TestPushTemplate(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	_, id, err := c.Control.PushTemplate(t.Context(), control.PushRequest{Template: "base:default", Destination: "oci:/tmp/x"})
	if err != nil {
		t.Fatal(err)
	}
	sent := c.Node.Pushed()[0]
	if sent.GetImageDigest() != apitest.BaseDigest || sent.GetBuildId() != id || sent.GetDestination() != "oci:/tmp/x" {
		t.Errorf("%v", sent)
	}
	c.Node.FinishBuild(id, "", "")
	if b, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: id}); err != nil || b.State != sandbox.BuildReady {
		t.Errorf("%+v, %v", b, err)
	}
	if _, _, err := c.Control.PushTemplate(t.Context(), control.PushRequest{Template: "base", Destination: "\n"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
}

func TestUploads(t *testing.T) {
	c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Limits.MaxUpload, cfg.Limits.MaxUploads = 10, 15 })
	ctx := t.Context()
	part := func(offset int64, body string, complete bool) (control.Upload, error) {
		return c.Control.AppendUpload(ctx, control.UploadPart{Hash: "h", Offset: offset, Size: int64(len(body)), Body: strings.NewReader(body), Complete: complete})
	}
	if up, err := part(0, "abc", false); err != nil || up.Bytes != 3 || up.Complete {
		t.Errorf("%+v, %v", up, err)
	}
	if _, err := part(2, "x", false); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("a gap: %v", err)
	}
	cut := io.MultiReader(strings.NewReader("de"), iotest.ErrReader(io.ErrUnexpectedEOF))
	if _, err := c.Control.AppendUpload(ctx, control.UploadPart{Hash: "h", Offset: 3, Size: -1, Body: cut}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a body that was cut off: %v", err)
	}
	if up, err := part(5, "f", true); err != nil || up.Bytes != 6 || !up.Complete {
		t.Errorf("%+v, %v", up, err)
	}
	for _, again := range []func() (control.Upload, error){
		func() (control.Upload, error) { return part(0, "other", true) },
		func() (control.Upload, error) { return c.Control.PutUpload(ctx, "h", 5, strings.NewReader("other")) },
		func() (control.Upload, error) { return c.Control.GetUpload(ctx, "h") },
	} {
		if up, err := again(); err != nil || up.Bytes != 6 || !up.Complete {
			t.Errorf("what is complete stays: %+v, %v", up, err)
		}
	}
	if _, err := c.Control.PutUpload(ctx, "big", -1, bytes.NewReader(make([]byte, 11))); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("too large: %v", err)
	}
	if _, err := c.Control.PutUpload(ctx, "none", 0, strings.NewReader("")); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("empty: %v", err)
	}
	if _, err := part(0, "../x", true); err != nil {
		t.Error(err)
	}
	if _, err := c.Control.PutUpload(ctx, "../x", 1, strings.NewReader("x")); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a path: %v", err)
	}
	// What was used longest ago makes room; a part never does.
	if _, err := c.Control.PutUpload(ctx, "second", 10, strings.NewReader("0123456789")); err != nil {
		t.Error(err)
	}
	if up, err := c.Control.GetUpload(ctx, "h"); err != nil || up.Complete {
		t.Errorf("%+v, %v", up, err)
	}
	if _, err := c.Control.AppendUpload(ctx, control.UploadPart{Hash: "p", Size: 9, Body: strings.NewReader("012345678")}); err != nil {
		t.Error(err)
	}
	_, err := c.Control.PutUpload(ctx, "third", 10, strings.NewReader("0123456789"))
	if !errors.Is(err, control.ErrNoSpace) || !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("no room: %v", err)
	}
}

func TestUploadSignature(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	now := time.Now()
	expires, signature := c.Control.SignUpload("h", now)
	if err := c.Control.CheckUpload("h", expires, signature, now); err != nil {
		t.Error(err)
	}
	for _, err := range []error{
		c.Control.CheckUpload("i", expires, signature, now),
		c.Control.CheckUpload("h", expires+1, signature, now),
		c.Control.CheckUpload("h", expires, "", now),
		c.Control.CheckUpload("h", expires, signature, now.Add(2*time.Hour)),
	} {
		if !errors.Is(err, sandbox.ErrDenied) {
			t.Error(err)
		}
	}
}

func TestBuildWithCheckpoint(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	spec := control.BuildSpec{Name: "server", Recipe: from("a"), Resources: sandbox.Resources{MilliCPU: 1000}}
	spec.StartCommand = "serve"
	_, b, err := c.Control.BuildTemplate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	c.Node.SaveBuild(b.ID, &agentv1.GuestSettings{User: "root", Workdir: "/srv", Env: map[string]string{"A": "b"}})
	c.Node.Keep(b.ID)
	c.Node.FinishBuild(b.ID, "sha256:1", "")
	if got, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: b.ID}); err != nil || got.Result.Checkpoint != sandbox.CheckpointMemory {
		t.Fatalf("%+v, %v", got, err)
	}
	req := minute()
	req.Template = "server"
	mustCreate(t, c, req)
	sent := c.Node.Created()[0]
	if sent.GetCheckpointId() != b.ID || sent.GetGuest().GetUser() != "root" || sent.GetGuest().GetWorkdir() != "/srv" || sent.GetGuest().GetEnv()["A"] != "b" {
		t.Errorf("sent %v", sent)
	}
	if sent.GetResources().GetMilliCpu() != 1000 || sent.GetResources().GetMemoryBytes() != 512<<20 || sent.GetCustomSize() {
		t.Errorf("sent %v", sent.GetResources())
	}
	req.Resources.MemoryBytes = 1 << 30
	if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("another size: %v", err)
	}
	// Its command comes along to what is built on top of it, unless there is another.
	for start, want := range map[string]string{"": "serve", "serve more": "serve more"} {
		spec := control.BuildSpec{Name: "child", Recipe: control.Recipe{FromTemplate: "server", StartCommand: start}}
		if _, _, err := c.Control.BuildTemplate(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		asked := c.Node.Asked()
		if got := asked[len(asked)-1].GetStartCommand(); got != want {
			t.Errorf("start command %q, want %q", got, want)
		}
	}
	// A node without the checkpoint is no place for it.
	c.Agents.Set("aaaaaa", nil)
	c.Join(t, apitest.NewNode("bbbbbb"))
	if err := c.Control.DeleteTemplate(t.Context(), "server"); err != nil {
		t.Error(err)
	}
}
