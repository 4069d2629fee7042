package store

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestTemplates(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	base := sandbox.Template{ID: "idbase", Names: []string{"base", "team/base:1"}, CreatedAt: time.Unix(1, 0).UTC()}
	other := sandbox.Template{ID: "idother", Names: []string{"other"}, CreatedAt: time.Unix(2, 0).UTC()}
	for _, tm := range []sandbox.Template{other, base} {
		if err := s.CreateTemplate(ctx, tm); err != nil {
			t.Fatal(err)
		}
	}
	for _, ref := range []string{"idbase", "base", "team/base:1"} {
		if got, err := s.Template(ctx, ref); err != nil || !cmp.Equal(got, base) {
			t.Errorf("Template(%q): %v, %s", ref, err, cmp.Diff(base, got))
		}
	}
	all, err := s.Templates(ctx)
	if err != nil || !cmp.Equal(all, []sandbox.Template{base, other}) {
		t.Errorf("Templates: %v, %+v", err, all)
	}

	rename := func(tm *sandbox.Template) error {
		tm.Names = []string{"base", "stable"}
		tm.Tags = map[string]sandbox.Tag{"default": {BuildID: "b"}}
		return nil
	}
	if got, err := s.UpdateTemplate(ctx, "idbase", rename); err != nil || got.Tags["default"].BuildID != "b" {
		t.Errorf("UpdateTemplate = %+v, %v", got, err)
	}
	if _, err := s.Template(ctx, "team/base:1"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a name that was given up: %v, want ErrNotFound", err)
	}
	if got, err := s.Template(ctx, "stable"); err != nil || got.ID != "idbase" {
		t.Errorf("a name that was added: %v, %v", got.ID, err)
	}
	steal := func(tm *sandbox.Template) error { tm.Names = []string{"other"}; return nil }
	if _, err := s.UpdateTemplate(ctx, "idbase", steal); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("taking another's name: %v, want ErrConflict", err)
	}
	if was, err := s.DeleteTemplate(ctx, "idbase"); err != nil || was.ID != "idbase" {
		t.Fatal(was, err)
	}
	if err := s.CreateTemplate(ctx, sandbox.Template{ID: "idnew", Names: []string{"base", "stable"}}); err != nil {
		t.Errorf("names of a deleted template are not free: %v", err)
	}
}

func TestTemplateRefusals(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	if err := s.CreateTemplate(ctx, sandbox.Template{ID: "id1", Names: []string{"taken"}}); err != nil {
		t.Fatal(err)
	}
	many := make([]string, maxTemplateNames+1)
	for i := range many {
		many[i] = fmt.Sprint("n", i)
	}
	tests := map[string]struct {
		in   sandbox.Template
		want error
	}{
		"name taken":     {sandbox.Template{ID: "id2", Names: []string{"free", "taken"}}, sandbox.ErrConflict},
		"id taken":       {sandbox.Template{ID: "id1", Names: []string{"free"}}, sandbox.ErrConflict},
		"no id":          {sandbox.Template{Names: []string{"free"}}, sandbox.ErrInvalid},
		"empty name":     {sandbox.Template{ID: "id2", Names: []string{""}}, sandbox.ErrInvalid},
		"control":        {sandbox.Template{ID: "id2", Names: []string{"a\x00b"}}, sandbox.ErrInvalid},
		"same name":      {sandbox.Template{ID: "id2", Names: []string{"free", "free"}}, sandbox.ErrInvalid},
		"too many names": {sandbox.Template{ID: "id2", Names: many}, sandbox.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if err := s.CreateTemplate(ctx, tt.in); !errors.Is(err, tt.want) {
				t.Errorf("CreateTemplate: %v, want %v", err, tt.want)
			}
		})
	}
	if _, err := s.Template(ctx, "free"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a refused template left a name behind: %v", err)
	}
	if _, err := s.DeleteTemplate(ctx, "nobody"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("DeleteTemplate: %v, want ErrNotFound", err)
	}
	stop := errors.New("stop")
	if _, err := s.UpdateTemplate(ctx, "id1", func(*sandbox.Template) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the change's own error: %v", err)
	}
}

// TestOneNameOneTemplate lets many templates take the same name at once: exactly one may.
func TestOneNameOneTemplate(t *testing.T) {
	s := fresh(t)
	for round := range 10 {
		name := fmt.Sprint("round-", round)
		var won atomic.Int64
		var wg sync.WaitGroup
		for i := range 6 {
			wg.Go(func() {
				id := sandbox.TemplateID(fmt.Sprintf("r%dt%d", round, i))
				switch err := s.CreateTemplate(t.Context(), sandbox.Template{ID: id, Names: []string{name}}); {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, sandbox.ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d templates took the name %q", won.Load(), name)
		}
	}
}

// TestConcurrentUpdates checks that no writer's change is lost.
func TestConcurrentUpdates(t *testing.T) {
	s := fresh(t)
	if err := s.CreateTemplate(t.Context(), sandbox.Template{ID: "id", Names: []string{"n"}}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			grow := func(tm *sandbox.Template) error {
				tm.Builds = append(tm.Builds, sandbox.Build{ID: strconv.Itoa(len(tm.Builds))})
				return nil
			}
			if _, err := s.UpdateTemplate(t.Context(), "id", grow); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got, err := s.Template(t.Context(), "id"); err != nil || len(got.Builds) != 10 {
		t.Errorf("after 10 updates there are %d builds (%v)", len(got.Builds), err)
	}
}
