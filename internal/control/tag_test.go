package control_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func tagsOf(t *testing.T, c *apitest.Cluster, ref string) map[string]string {
	t.Helper()
	tpl, err := c.Control.GetTemplate(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, tag := range tpl.Tags {
		out[name] = tag.BuildID
	}
	return out
}

func TestTags(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	ctx := t.Context()
	v1 := built(t, c, "tools:v1", "sha256:1")
	req := minute()
	req.Template = "tools"
	if _, err := c.Control.Create(ctx, req); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a name whose default tag was never built: %v", err)
	}
	v2 := built(t, c, "tools", "sha256:2")
	if diff := cmp.Diff(map[string]string{"v1": v1.ID, "default": v2.ID}, tagsOf(t, c, "tools")); diff != "" {
		t.Error(diff)
	}
	for _, ref := range []string{"tools:v1", "tools:" + v1.ID} {
		req.Template = ref
		if box := mustCreate(t, c, req); box.TemplateName != ref {
			t.Errorf("%s gave %s", ref, box.TemplateName)
		}
		if got := c.Node.Created()[len(c.Node.Created())-1].GetImageDigest(); got != "sha256:1" {
			t.Errorf("%s starts from %s", ref, got)
		}
	}
	if _, b, err := c.Control.AssignTags(ctx, "tools:v1", []string{"stable", "default"}); err != nil || b.ID != v1.ID {
		t.Error(err)
	}
	if diff := cmp.Diff(map[string]string{"v1": v1.ID, "default": v1.ID, "stable": v1.ID}, tagsOf(t, c, "tools")); diff != "" {
		t.Error(diff)
	}
	if err := c.Control.RemoveTags(ctx, "tools", []string{"stable", "v1"}); err != nil {
		t.Error(err)
	}
	refused := []struct {
		err  error
		kind error
	}{
		{c.Control.RemoveTags(ctx, "tools", []string{"default"}), sandbox.ErrInvalid},
		{c.Control.RemoveTags(ctx, "tools", []string{"v1"}), sandbox.ErrNotFound},
		{c.Control.RemoveTags(ctx, "tools", nil), sandbox.ErrInvalid},
		{c.Control.RemoveTags(ctx, "nope", []string{"v1"}), sandbox.ErrNotFound},
		{second(c.Control.AssignTags(ctx, "tools:v9", []string{"x"})), sandbox.ErrNotFound},
		{second(c.Control.AssignTags(ctx, "tools", []string{"a b"})), sandbox.ErrInvalid},
		{second(c.Control.AssignTags(ctx, "tools", nil)), sandbox.ErrInvalid},
	}
	for i, r := range refused {
		if !errors.Is(r.err, r.kind) {
			t.Errorf("%d: %v, want %v", i, r.err, r.kind)
		}
	}
}

func second(_ sandbox.Template, _ sandbox.Build, err error) error { return err }

// Tags that are asked for beside a bare name replace "default"; with it they join it.
func TestAnnouncedTags(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	tests := []struct {
		name string
		tags []string
		want []string
	}{
		{"a", nil, []string{"default"}},
		{"b:v1", nil, []string{"v1"}},
		{"c:v1", []string{"v2", "v1"}, []string{"v1", "v2"}},
		{"d", []string{"v1", "v2"}, []string{"v1", "v2"}},
		{"e", []string{"v1", "default"}, []string{"v1", "default"}},
	}
	for _, tt := range tests {
		_, b, err := c.Control.AnnounceBuild(t.Context(), control.BuildSpec{Name: tt.name, Tags: tt.tags})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, b.Tags); diff != "" {
			t.Errorf("%s %v: %s", tt.name, tt.tags, diff)
		}
	}
}

// Builds that nobody can ask for any more go, and what only they used with them.
func TestOldBuildsAreDropped(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	for i := range 7 {
		built(t, c, "tools", fmt.Sprint("sha256:", i))
	}
	tpl, err := c.Control.GetTemplate(t.Context(), "tools")
	if err != nil || len(tpl.Builds) != 4 {
		t.Fatalf("%d builds, %v", len(tpl.Builds), err)
	}
	if diff := cmp.Diff([]string{"sha256:0", "sha256:1", "sha256:2"}, c.Node.Removed()); diff != "" {
		t.Error(diff)
	}
}

func TestDeleteTagged(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	ctx := t.Context()
	built(t, c, "tools:v1", "sha256:1")
	built(t, c, "tools:v2", "sha256:2")
	if _, _, err := c.Control.AssignTags(ctx, "tools:v2", []string{"v3"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Control.DeleteTemplate(ctx, "tools:nope"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
	for _, tag := range []string{"v1", "v2"} {
		if err := c.Control.DeleteTemplate(ctx, "tools:"+tag); err != nil {
			t.Fatal(err)
		}
	}
	// v3 means the same build as v2.
	if diff := cmp.Diff([]string{"sha256:1"}, c.Node.Removed()); diff != "" {
		t.Error(diff)
	}
	if err := c.Control.DeleteTemplate(ctx, "tools:v3"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.GetTemplate(ctx, "tools"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("without its last tag: %v", err)
	}
	if diff := cmp.Diff([]string{"sha256:1", "sha256:2"}, c.Node.Removed()); diff != "" {
		t.Error(diff)
	}
	if err := c.Control.DeleteTemplate(ctx, "base:default"); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
}
