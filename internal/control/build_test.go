package control_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestBuild(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	spec := control.BuildSpec{Name: "Tools", Recipe: control.Recipe{
		Sources: []string{"docker.io/library/debian:12"}, RegistryPassword: "hush",
	}}
	tpl, built, err := c.Control.BuildTemplate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	req := minute()
	req.Template = "tools"
	if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("create while it is being built: %v", err)
	}
	b, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: built.ID, Offset: 0, Wait: 0})
	if err != nil || b.State != sandbox.BuildBuilding || len(b.Entries) != 1 {
		t.Errorf("%+v, %v", b, err)
	}
	c.Node.FinishBuild(built.ID, "sha256:70015", "")
	if b, err = c.Control.GetBuild(t.Context(), control.BuildQuery{ID: built.ID, Offset: 1, Wait: time.Second}); err != nil || b.State != sandbox.BuildReady || len(b.Entries) != 1 {
		t.Errorf("%+v, %v", b, err)
	}
	mustCreate(t, c, req)

	same, again, err := c.Control.BuildTemplate(t.Context(), spec)
	if err != nil || same.ID != tpl.ID || again.ID == built.ID {
		t.Fatalf("rebuilt as %s, %v", same.ID, err)
	}
	mustCreate(t, c, req) // from the image that was there before
	c.Node.FinishBuild(again.ID, "", "no such image")
	if b, err = c.Control.GetBuild(t.Context(), control.BuildQuery{ID: again.ID, Offset: 0, Wait: 0}); err != nil || b.State != sandbox.BuildFailed {
		t.Errorf("%+v, %v", b, err)
	}
	got, err := c.Control.GetTemplate(t.Context(), "tools")
	if err != nil || got.Builds[0].Error != "no such image" || got.Tags[sandbox.DefaultTag].BuildID != built.ID {
		t.Errorf("%+v, %v", got, err)
	}
	if err := c.Control.DeleteTemplate(t.Context(), "tools"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"sha256:70015"}, c.Node.Removed()); diff != "" {
		t.Error(diff)
	}
	if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
	if err := c.Control.DeleteTemplate(t.Context(), "base"); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
	if _, err := c.Control.GetBuild(t.Context(), control.BuildQuery{ID: "nope", Offset: 0, Wait: 0}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

func from(sources ...string) control.Recipe { return control.Recipe{Sources: sources} }

func TestBuildRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	tests := []struct {
		spec control.BuildSpec
		kind error
	}{
		{control.BuildSpec{Name: "x"}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "", Recipe: from("debian:bookworm")}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x", Recipe: from("")}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x", Recipe: from("a\nb")}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x", Tags: []string{"-"}, Recipe: from("a")}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x", Recipe: from("a"), Resources: sandbox.Resources{MilliCPU: 1}}, sandbox.ErrInvalid},
	}
	for _, tt := range tests {
		if _, _, err := c.Control.BuildTemplate(t.Context(), tt.spec); !errors.Is(err, tt.kind) {
			t.Errorf("%+v: %v", tt.spec, err)
		}
	}
}

func TestEnsureTemplate(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	spec := control.BuildSpec{Name: "base", Recipe: from("debian:bookworm")}
	got, b, err := c.Control.EnsureTemplate(t.Context(), spec)
	if err != nil || b.State != sandbox.BuildReady || got.ID != apitest.BaseID {
		t.Errorf("an image that is there: %+v, %v", got, err)
	}
	// The node has lost its images.
	c.Restart(t, nil)
	c.Agents.Set("aaaaaa", c.Node)
	_, err = c.Control.Register(t.Context(), &nodev1.RegisterRequest{
		NodeId: "aaaaaa", Capacity: nil, Engines: []*nodev1.Engine{{Name: "gvisor"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	got, b, err = c.Control.EnsureTemplate(t.Context(), spec)
	if err != nil || b.State != sandbox.BuildBuilding || got.ID != apitest.BaseID {
		t.Errorf("an image that is gone: %+v, %v", got, err)
	}
}

// Run ends builds that nobody looks at, and takes up those that a restart of the server cut off.
func TestRunFollowsBuilds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Control.Run(ctx) }()
		tpl, built, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: "tools", Recipe: from("dir:/tools")})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		cancel() // the server restarts
		if err := <-done; err != nil {
			t.Error(err)
		}
		c.Restart(t, nil)
		ctx, cancel = context.WithCancel(t.Context())
		go func() { done <- c.Control.Run(ctx) }()
		asleep(3 * time.Second) // no node has joined yet
		c.Join(t, c.Node)
		asleep(3 * time.Second)
		if b := newest(t, c, "tools"); b.State != sandbox.BuildBuilding {
			t.Fatalf("%+v", b)
		}
		c.Node.FinishBuild(built.ID, "sha256:70015", "")
		asleep(3 * time.Second)
		if b := newest(t, c, string(tpl.ID)); b.State != sandbox.BuildReady || b.ImageDigest != "sha256:70015" {
			t.Errorf("%+v", b)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// A build whose node has restarted has failed.
func TestForgottenBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Control.Run(ctx) }()
		if _, _, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: "tools", Recipe: from("a")}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c.Node.ForgetBuilds()
		asleep(time.Minute)
		if b := newest(t, c, "tools"); b.State != sandbox.BuildFailed || !strings.Contains(b.Error, "restarted") {
			t.Errorf("%+v", b)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func newest(t *testing.T, c *apitest.Cluster, ref string) sandbox.Build {
	t.Helper()
	tpl, err := c.Control.GetTemplate(t.Context(), ref)
	if err != nil || len(tpl.Builds) == 0 {
		t.Fatalf("%+v, %v", tpl, err)
	}
	return tpl.Builds[0]
}
