package control_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func upper(s string) string { return strings.ToUpper(s) }

func routeOf(w *proxyv1.Route) sandbox.Route {
	states := map[agentv1.State]sandbox.State{
		agentv1.State_STATE_RUNNING: sandbox.StateRunning, agentv1.State_STATE_PAUSED: sandbox.StatePaused,
		agentv1.State_STATE_DELETED: sandbox.StateDeleted,
	}
	return sandbox.Route{
		ID: sandbox.ID(w.GetId()), Node: sandbox.NodeID(w.GetNodeId()), State: states[w.GetState()], Reason: w.GetReason(),
		Generation: w.GetGeneration(), Secure: w.GetSecure(), AutoResume: w.GetAutoResume(),
	}
}

func resumable() control.CreateRequest {
	return control.CreateRequest{Timeout: time.Minute, AutoPause: true, AutoResume: true}
}

// TestWakeOnce has many wake one sandbox: it is resumed once, for as long as it was last given.
func TestWakeOnce(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, resumable())
	mustPause(t, c, box.ID)
	release := c.Node.Hold()
	var wait sync.WaitGroup
	for range 100 {
		wait.Go(func() {
			r, err := c.Control.Wake(t.Context(), box.ID)
			if err != nil || r.State != sandbox.StateRunning {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
	release()
	wait.Wait()
	if n := c.Node.Resumes(); n != 1 {
		t.Errorf("resumed %d times", n)
	}
	now, err := c.Control.Get(t.Context(), box.ID)
	if left := time.Until(now.EndAt); err != nil || left < 55*time.Second || left > time.Minute {
		t.Errorf("it ends in %s, %v", left, err)
	}
	if r, err := c.Control.Wake(t.Context(), box.ID); err != nil || r.State != sandbox.StateRunning {
		t.Errorf("a running one: %+v, %v", r, err)
	}
}

// TestWakeGoesOn checks that a wake does not end with the caller who began it.
func TestWakeGoesOn(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, resumable())
	mustPause(t, c, box.ID)
	release := c.Node.Hold()
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := c.Control.Wake(ctx, box.ID)
		first <- err
	}()
	seen := sandbox.Route{State: sandbox.StatePaused, Generation: box.Generation + 2, Node: "aaaaaa"}
	for seen.State == sandbox.StatePaused { // until the resume is under way
		now, err := c.Control.Await(t.Context(), box.ID, seen)
		if err != nil {
			t.Fatal(err)
		}
		seen = now
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller who left: %v", err)
	}
	release()
	if r, err := c.Control.Wake(t.Context(), box.ID); err != nil || r.State != sandbox.StateRunning || c.Node.Resumes() != 1 {
		t.Errorf("%+v, %v after %d resumes", r, err, c.Node.Resumes())
	}
}

func TestWakeRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	c.Node.Room = 1
	quiet := mustCreate(t, c, minute())
	mustPause(t, c, quiet.ID)
	killed := mustCreate(t, c, resumable())
	mustPause(t, c, killed.ID)
	if err := c.Control.Kill(t.Context(), killed.ID); err != nil {
		t.Fatal(err)
	}
	crowded := mustCreate(t, c, resumable())
	mustPause(t, c, crowded.ID)
	files := mustCreate(t, c, resumable())
	if _, err := c.Control.Pause(t.Context(), files.ID, sandbox.CheckpointFiles); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, c, minute()) // takes the room
	tests := []struct {
		name string
		id   sandbox.ID
		kind error
	}{
		{"without auto-resume", quiet.ID, sandbox.ErrConflict},
		{"killed", killed.ID, sandbox.ErrNotFound},
		{"no room", crowded.ID, sandbox.ErrExhausted},
		{"files alone were kept", files.ID, sandbox.ErrConflict},
		{"unknown", "unknown", sandbox.ErrNotFound},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if r, err := c.Control.Wake(t.Context(), tt.id); !errors.Is(err, tt.kind) {
				t.Errorf("%+v, %v, want %v", r, err, tt.kind)
			}
		})
	}
	if n := c.Node.Resumes(); n != 0 {
		t.Errorf("resumed %d times", n)
	}
}

// TestWakeWaitsForPause has a wake meet a pause that is under way.
func TestWakeWaitsForPause(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, resumable())
	release := c.Node.Hold()
	paused := make(chan error, 1)
	go func() {
		_, err := c.Control.Pause(t.Context(), box.ID, "")
		paused <- err
	}()
	if _, err := c.Control.Await(t.Context(), box.ID, box.Route()); err != nil { // until it is pausing
		t.Fatal(err)
	}
	woken := make(chan error, 1)
	go func() {
		_, err := c.Control.Wake(t.Context(), box.ID)
		woken <- err
	}()
	release()
	if err := errors.Join(<-paused, <-woken); err != nil {
		t.Error(err)
	}
	if n := c.Node.Resumes(); n != 1 {
		t.Errorf("resumed %d times", n)
	}
}
