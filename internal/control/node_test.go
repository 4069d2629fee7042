package control_test

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func mustUpdate(t *testing.T, c *apitest.Cluster, change control.NodeChange) control.Node {
	t.Helper()
	n, err := c.Control.UpdateNode(t.Context(), "node-aaaaaa", change)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func eventTypes(t *testing.T, c *apitest.Cluster) []string {
	t.Helper()
	all, err := c.Control.Events(t.Context(), control.EventQuery{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range all {
		if strings.HasPrefix(e.Type, "node_") {
			out = append(out, e.Type)
		}
	}
	return out
}

// impatient has silent nodes noticed as by default.
func impatient(cfg *control.Config) { cfg.Limits = control.Limits{} }

func TestNodeStatesAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, impatient)
		running(t, c)
		began := time.Now()
		asleep(20 * time.Second)
		n, err := c.Control.GetNode(t.Context(), "aaaaaa")
		if err != nil || n.State != sandbox.NodeDown || n.StateAt.Sub(began) != 15*time.Second {
			t.Errorf("%s since %v, %v", n.State, n.StateAt.Sub(began), err)
		}
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		asleep(2 * time.Second)
		want := []string{"node_registered", "node_suspect", "node_down", "node_ready"}
		if diff := cmp.Diff(want, eventTypes(t, c)); diff != "" {
			t.Error(diff)
		}
	})
}

func TestCordon(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	yes, no := true, false
	n := mustUpdate(t, c, control.NodeChange{Cordoned: &yes, Reason: "new disk"})
	if n.State != sandbox.NodeCordoned || n.Settings.Reason != "new disk" || n.StateAt.IsZero() {
		t.Errorf("%+v", n)
	}
	if _, err := c.Control.Create(t.Context(), minute()); !errors.Is(err, sandbox.ErrExhausted) || !strings.Contains(err.Error(), "is cordoned") {
		t.Errorf("create: %v", err)
	}
	if _, err := c.Control.Fork(t.Context(), box.ID, control.ForkRequest{Count: 1, Timeout: time.Minute}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("fork: %v", err)
	}
	// What is there stays usable: a paused sandbox has nowhere else to resume.
	if _, err := c.Control.Pause(t.Context(), box.ID, sandbox.CheckpointMemory); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.Resume(t.Context(), box.ID, control.ConnectRequest{Timeout: time.Minute}); err != nil {
		t.Errorf("resume: %v", err)
	}
	c.Restart(t, nil)
	c.Join(t, c.Node)
	if n, err := c.Control.GetNode(t.Context(), "aaaaaa"); err != nil || n.State != sandbox.NodeCordoned {
		t.Errorf("after a restart: %s, %v", n.State, err)
	}
	began := time.Now()
	if n := mustUpdate(t, c, control.NodeChange{Cordoned: &no}); n.State != sandbox.NodeReady || n.StateAt.Before(began) {
		t.Errorf("uncordoned at %s: %s since %s", began, n.State, n.StateAt)
	}
	mustCreate(t, c, minute())
	want := []string{"node_registered", "node_cordoned", "node_registered", "node_uncordoned"}
	if diff := cmp.Diff(want, eventTypes(t, c)); diff != "" {
		t.Error(diff)
	}
}

// TestDrainHasJustBegun counts what there is to move before anything was tried.
func TestDrainHasJustBegun(t *testing.T) {
	c := apitest.NewCluster(t, nil) // its control does not run
	mustCreate(t, c, minute())
	n, err := c.Control.DrainNode(t.Context(), "aaaaaa", control.DrainRequest{})
	if err != nil || n.Drain == nil || n.Drain.Left != 1 {
		t.Errorf("%+v, %v", n.Drain, err)
	}
}

func TestLabelsAndTaints(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	zone := "eu"
	n := mustUpdate(t, c, control.NodeChange{
		Labels:    map[string]*string{"zone": &zone},
		AddTaints: []sandbox.Taint{{Key: "gpu", Value: "only", Effect: sandbox.NoSchedule}},
	})
	c.Join(t, c.Node) // registering again leaves them
	n, _ = c.Control.GetNode(t.Context(), string(n.ID))
	if n.Labels["zone"] != "eu" || n.Labels["cloister.dev/hostname"] != "node-aaaaaa" || len(n.Settings.Taints) != 1 {
		t.Errorf("labels %v, settings %+v", n.Labels, n.Settings)
	}
	tests := []struct {
		metadata map[string]string
		kind     error
		want     string
	}{
		{nil, sandbox.ErrExhausted, "taint gpu=only:NoSchedule"},
		{map[string]string{control.KeyTolerations: "gpu=none"}, sandbox.ErrExhausted, "taint gpu=only"},
		{map[string]string{control.KeyTolerations: "gpu=only"}, nil, ""},
		{map[string]string{control.KeyTolerations: "*", control.KeyNodeSelector: "zone=us"}, sandbox.ErrExhausted, "selector's zone=us"},
		{map[string]string{control.KeyTolerations: "gpu", control.KeyNodeSelector: "zone in (eu,us), cloister.dev/arch=amd64"}, nil, ""},
		{map[string]string{control.KeyTolerations: "*", control.KeyNodeAffinity: "zone=us*50"}, nil, ""},
		{map[string]string{control.KeyNodeSelector: "=eu"}, sandbox.ErrInvalid, "metadata cloister.dev/node-selector"},
		{map[string]string{control.KeyTolerations: "a:b"}, sandbox.ErrInvalid, "NoSchedule"},
		{map[string]string{control.KeyNodeAffinity: "zone=eu*1000"}, sandbox.ErrInvalid, "-100 to 100"},
	}
	for _, tt := range tests {
		req := minute()
		req.Metadata = tt.metadata
		_, err := c.Control.Create(t.Context(), req)
		if !errors.Is(err, tt.kind) || (err != nil && !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%v: %v", tt.metadata, err)
		}
	}
	n = mustUpdate(t, c, control.NodeChange{Labels: map[string]*string{"zone": nil}, RemoveTaints: []sandbox.Taint{{Key: "gpu"}}})
	if _, ok := n.Labels["zone"]; ok || len(n.Settings.Taints) > 0 {
		t.Errorf("left %v, %v", n.Labels, n.Settings.Taints)
	}
}

func TestUpdateNodeRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	bad, own := "no spaces here", "x"
	tests := []struct {
		change control.NodeChange
		kind   error
		want   string
	}{
		{control.NodeChange{Labels: map[string]*string{"": &own}}, sandbox.ErrInvalid, "key"},
		{control.NodeChange{Labels: map[string]*string{"a": &bad}}, sandbox.ErrInvalid, "label a: value"},
		{control.NodeChange{Labels: map[string]*string{"cloister.dev/arch": &own}}, sandbox.ErrInvalid, "Cloister's own"},
		{control.NodeChange{Labels: map[string]*string{"a": nil}}, sandbox.ErrConflict, "label a was not set"},
		{control.NodeChange{AddTaints: []sandbox.Taint{{Key: "a", Effect: "Never"}}}, sandbox.ErrInvalid, "PreferNoSchedule"},
		{control.NodeChange{RemoveTaints: []sandbox.Taint{{Key: "a"}}}, sandbox.ErrConflict, "taint a is not"},
		{control.NodeChange{RemoveTaints: []sandbox.Taint{{Key: "a", Effect: "x"}}}, sandbox.ErrInvalid, "effect"},
		{control.NodeChange{Reason: strings.Repeat("x", 300)}, sandbox.ErrInvalid, "300 bytes"},
	}
	for _, tt := range tests {
		_, err := c.Control.UpdateNode(t.Context(), "aaaaaa", tt.change)
		if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v", tt.change, err)
		}
	}
	if _, err := c.Control.UpdateNode(t.Context(), "nobody", control.NodeChange{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
	if got := eventTypes(t, c); len(got) != 1 {
		t.Errorf("events %v", got)
	}
}

// A node that fails is asked last while it has failed too often lately, and first again later.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Log = slog.New(slog.DiscardHandler) })
		second := apitest.NewNode("bbbbbb")
		c.Join(t, second)
		c.Node.Fail(connect.NewError(connect.CodeUnavailable, errors.New("connection refused")))
		failures := func() float64 {
			n, err := c.Control.GetNode(t.Context(), "aaaaaa")
			if err != nil {
				t.Fatal(err)
			}
			return n.Failures
		}
		for range 100 {
			mustCreate(t, c, minute())
		}
		if got := failures(); got != 5 {
			t.Errorf("asked for %v failures, want the 5 after which it is left alone", got)
		}
		second.Fail(connect.NewError(connect.CodeResourceExhausted, errors.New("full")))
		c.Node.Fail(nil)
		asleep(31 * time.Second)
		if err := c.Report(t, c.Node, false); err != nil {
			t.Fatal(err)
		}
		if box := mustCreate(t, c, minute()); box.NodeID != "aaaaaa" {
			t.Errorf("created at %s", box.NodeID)
		}
		if got := failures(); got > 1.5 {
			t.Errorf("%v failures count after a success", got)
		}
	})
}
