package control_test

import (
	"context"
	"errors"
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
	spec := control.BuildSpec{Name: "Tools", Sources: []string{"docker.io/library/debian:12"}, RegistryPassword: "hush"}
	built, err := c.Control.BuildTemplate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	req := minute()
	req.Template = "tools"
	if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("create while it is being built: %v", err)
	}
	b, err := c.Control.GetBuild(t.Context(), built.BuildID, 0, 0)
	if err != nil || b.State != control.BuildBuilding || len(b.Entries) != 1 {
		t.Errorf("%+v, %v", b, err)
	}
	c.Node.FinishBuild(built.BuildID, "sha256:70015", "")
	if b, err = c.Control.GetBuild(t.Context(), built.BuildID, 1, time.Second); err != nil || b.State != control.BuildReady || len(b.Entries) != 1 {
		t.Errorf("%+v, %v", b, err)
	}
	mustCreate(t, c, req)

	again, err := c.Control.BuildTemplate(t.Context(), spec)
	if err != nil || again.ID != built.ID {
		t.Fatalf("rebuilt as %s, %v", again.ID, err)
	}
	mustCreate(t, c, req) // from the image that was there before
	c.Node.FinishBuild(again.BuildID, "", "no such image")
	if b, err = c.Control.GetBuild(t.Context(), again.BuildID, 0, 0); err != nil || b.State != control.BuildFailed {
		t.Errorf("%+v, %v", b, err)
	}
	got, err := c.Control.GetTemplate(t.Context(), "tools")
	if err != nil || got.BuildError != "no such image" || got.ImageDigest != "sha256:70015" {
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
	if _, err := c.Control.GetBuild(t.Context(), "nope", 0, 0); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

func TestBuildRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	tests := []struct {
		spec control.BuildSpec
		kind error
	}{
		{control.BuildSpec{Name: "x"}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "", Sources: []string{"debian:bookworm"}}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x", Sources: []string{""}}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x", Sources: []string{"a\nb"}}, sandbox.ErrInvalid},
		{control.BuildSpec{Name: "x:v1", Sources: []string{"debian:bookworm"}}, sandbox.ErrUnsupported},
		{control.BuildSpec{Name: "x", Sources: []string{"a"}, Resources: sandbox.Resources{MilliCPU: 1}}, sandbox.ErrInvalid},
	}
	for _, tt := range tests {
		if _, err := c.Control.BuildTemplate(t.Context(), tt.spec); !errors.Is(err, tt.kind) {
			t.Errorf("%+v: %v", tt.spec, err)
		}
	}
}

func TestEnsureTemplate(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	spec := control.BuildSpec{Name: "base", Sources: []string{"debian:bookworm"}}
	got, err := c.Control.EnsureTemplate(t.Context(), spec)
	if err != nil || got.BuildState != control.BuildReady || got.ID != apitest.BaseID {
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
	got, err = c.Control.EnsureTemplate(t.Context(), spec)
	if err != nil || got.BuildState != control.BuildBuilding || got.ID != apitest.BaseID {
		t.Errorf("an image that is gone: %+v, %v", got, err)
	}
}

// Run ends builds that nobody looks at, and takes up those that a restart of server or node cut off.
func TestRunFollowsBuilds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Control.Run(ctx) }()
		built, err := c.Control.BuildTemplate(t.Context(), control.BuildSpec{Name: "tools", Sources: []string{"dir:/tools"}})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c.Node.ForgetBuilds() // the node restarts
		asleep(time.Second)
		resumed, err := c.Control.GetTemplate(t.Context(), "tools")
		if err != nil || resumed.BuildState != control.BuildBuilding {
			t.Fatalf("%+v, %v", resumed, err)
		}
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
		if resumed, err = c.Control.GetTemplate(t.Context(), "tools"); err != nil || resumed.BuildState != control.BuildBuilding {
			t.Fatalf("%+v, %v", resumed, err)
		}
		c.Node.FinishBuild(resumed.BuildID, "sha256:70015", "")
		asleep(3 * time.Second)
		got, err := c.Control.GetTemplate(t.Context(), "tools")
		if err != nil || got.BuildState != control.BuildReady || got.ImageDigest != "sha256:70015" || got.ID != built.ID {
			t.Errorf("%+v, %v", got, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
