package control_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestFork(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	req := minute()
	req.Metadata, req.Env, req.Secure, req.AutoPause = map[string]string{"user": "ann"}, map[string]string{"A": "b"}, true, true
	box := mustCreate(t, c, req)
	forks, err := c.Control.Fork(t.Context(), box.ID, control.ForkRequest{Count: 10, Timeout: time.Hour})
	if err != nil || len(forks) != 10 {
		t.Fatalf("%d forks, %v", len(forks), err)
	}
	seen := map[sandbox.ID]bool{box.ID: true}
	for _, f := range forks {
		if f.Err != nil || seen[f.Sandbox.ID] || f.Sandbox.State != sandbox.StateRunning || f.Sandbox.Metadata["user"] != "ann" ||
			!f.Sandbox.Secure || !f.Sandbox.AutoPause || f.Sandbox.Resources != box.Resources || f.Sandbox.TemplateID != box.TemplateID {
			t.Errorf("fork %+v", f)
		}
		seen[f.Sandbox.ID] = true
	}
	for _, sent := range c.Node.Created()[1:] {
		if sent.GetGuest().GetEnv()["A"] != "b" {
			t.Errorf("asked for %v", sent)
		}
	}
	if left := c.Node.Checkpoints(); len(left) > 0 {
		t.Errorf("checkpoints %v are left", left)
	}
	if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StateRunning {
		t.Errorf("the source is %s", got.State)
	}
}

func TestForkRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	for _, req := range []control.ForkRequest{{Count: 0, Timeout: time.Minute}, {Count: 101, Timeout: time.Minute}, {Count: 1}} {
		if _, err := c.Control.Fork(t.Context(), box.ID, req); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", req, err)
		}
	}
	if _, err := c.Control.Fork(t.Context(), "nobody", control.ForkRequest{Count: 1, Timeout: time.Minute}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("of nobody: %v", err)
	}
	c.Node.Room = 3
	forks, err := c.Control.Fork(t.Context(), box.ID, control.ForkRequest{Count: 5, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	got := map[bool]int{}
	for _, f := range forks {
		got[f.Err == nil]++
		if f.Err != nil && !errors.Is(f.Err, sandbox.ErrExhausted) {
			t.Error(f.Err)
		}
	}
	if diff := cmp.Diff(map[bool]int{true: 2, false: 3}, got); diff != "" || len(c.Node.Checkpoints()) > 0 {
		t.Errorf("%s, left %v", diff, c.Node.Checkpoints())
	}
	mustPause(t, c, box.ID)
	if _, err := c.Control.Fork(t.Context(), box.ID, control.ForkRequest{Count: 1, Timeout: time.Minute}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("of a paused one: %v", err)
	}
}

// TestSweep checks that what a server which crashed has left at a node goes when the node registers, and nothing else.
func TestSweep(t *testing.T) {
	const own = "iaaaaaabbbbbbbbbbbbb"
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	kept := mustSnapshot(t, c, box.ID, "snap")
	c.Node.Keep("fork-5e1bc3f0-7c8f-4c51-9d3b-f7d2a5b1c0de")
	c.Node.Keep("0d9f6a52-58a1-4e0c-8f39-1c1de6f0b7aa")
	c.Node.Keep(own)
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	g.Go(func() { _ = c.Control.Run(ctx) })
	defer g.Wait()
	defer cancel()
	c.Join(t, c.Node)
	deadline := time.Now().Add(10 * time.Second)
	for len(c.Node.Checkpoints()) > 2 && time.Now().Before(deadline) {
		<-time.After(time.Millisecond)
	}
	want := map[string]bool{kept.Build.ID: true, own: true}
	for _, id := range c.Node.Checkpoints() {
		if !want[id] {
			t.Errorf("%s is left", id)
		}
		delete(want, id)
	}
	if len(want) > 0 {
		t.Errorf("%v were removed", want)
	}
}
