package control_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestChangeTemplate checks what can be set of a template, and that it counts.
func TestChangeTemplate(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	c.Join(t, apitest.NewNode("bbbbbb"))
	got, err := c.Control.ChangeTemplate(t.Context(), "base", control.TemplateChange{Placement: new("3"), NodeSelector: new("cloister.dev/node=bbbbbb")})
	if err != nil || control.PlacementText(got.Placement) != "3" {
		t.Fatalf("%+v, %v", got, err)
	}
	for range 5 {
		if box := mustCreate(t, c, minute()); box.NodeID != "bbbbbb" {
			t.Errorf("created at %s", box.NodeID)
		}
	}
	for _, text := range []string{"on_demand", "all", "12", ""} {
		got, err := c.Control.ChangeTemplate(t.Context(), "base", control.TemplateChange{Placement: &text})
		if err != nil || control.PlacementText(got.Placement) != text || got.NodeSelector == "" {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for name, change := range map[string]control.TemplateChange{
		"nothing": {}, "placement": {Placement: new("0")}, "word": {Placement: new("some")}, "selector": {NodeSelector: new("=")},
		"affinity": {NodeAffinity: new("*")}, "tolerations": {Tolerations: new("a:b:c:d")},
	} {
		if _, err := c.Control.ChangeTemplate(t.Context(), "base", change); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestIdempotencyKeyOfALostNode checks what a repeated request hears while its node is silent, down, and removed.
func TestIdempotencyKeyOfALostNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		req := minute()
		req.IdempotencyKey = "order-1"
		box := mustCreate(t, c, req)
		other := apitest.NewNode("bbbbbb")
		c.Join(t, other)
		silent(t, c, c.Node, 4*time.Second, other)
		if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("it is silent: %v", err)
		}
		silent(t, c, c.Node, 14*time.Second, other)
		if _, err := c.Control.Create(t.Context(), req); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "node-aaaaaa") {
			t.Errorf("it is down: %v", err)
		}
		c.Agents.Set("aaaaaa", c.Node)
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		if again := mustCreate(t, c, req); again.ID != box.ID {
			t.Errorf("it is back: made %s, not %s", again.ID, box.ID)
		}
		silent(t, c, c.Node, 20*time.Second, other)
		if err := c.Control.RemoveNode(t.Context(), "aaaaaa", true); err != nil {
			t.Fatal(err)
		}
		again := mustCreate(t, c, req)
		if again.NodeID != "bbbbbb" {
			t.Errorf("it was removed: made at %s", again.NodeID)
		}
		if third := mustCreate(t, c, req); third.ID != again.ID {
			t.Errorf("repeated: made %s, not %s", third.ID, again.ID)
		}
	})
}
