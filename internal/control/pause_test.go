package control_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func mustPause(t *testing.T, c *apitest.Cluster, id sandbox.ID) sandbox.Sandbox {
	t.Helper()
	box, err := c.Control.Pause(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	return box
}

func hour() control.ConnectRequest { return control.ConnectRequest{Timeout: time.Hour} }

func TestPauseAndConnect(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	before, _ := c.Control.GetNode(t.Context(), "aaaaaa")
	paused := mustPause(t, c, box.ID)
	if paused.State != sandbox.StatePaused || paused.PausedKind != sandbox.CheckpointMemory || paused.PausedAt.IsZero() || paused.PausedBytes == 0 {
		t.Errorf("paused %+v", paused)
	}
	after, _ := c.Control.GetNode(t.Context(), "aaaaaa")
	if room := before.Allocated.Sub(after.Allocated); room != box.Resources {
		t.Errorf("the pause gave back %+v", room)
	}
	if _, err := c.Control.Pause(t.Context(), box.ID, ""); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "already") {
		t.Errorf("paused twice: %v", err)
	}
	list, err := c.Control.List(t.Context(), control.ListQuery{States: []sandbox.State{sandbox.StatePaused}})
	if err != nil || len(list.Sandboxes) != 1 || list.Running != 0 {
		t.Errorf("paused are %+v, %v", list, err)
	}
	again, resumed, err := c.Control.Connect(t.Context(), box.ID, hour())
	if err != nil || !resumed || again.State != sandbox.StateRunning || !again.PausedAt.IsZero() {
		t.Errorf("connected to %+v, resumed %t, %v", again, resumed, err)
	}
	again, resumed, err = c.Control.Connect(t.Context(), box.ID, minute2())
	if err != nil || resumed || time.Until(again.EndAt) < 59*time.Minute {
		t.Errorf("connected to a running one: it ends at %v, resumed %t, %v", again.EndAt, resumed, err)
	}
}

func minute2() control.ConnectRequest { return control.ConnectRequest{Timeout: 2 * time.Minute} }

func TestPauseRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	if _, err := c.Control.Pause(t.Context(), box.ID, "disk"); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("an unknown kind: %v", err)
	}
	if _, err := c.Control.Resume(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("resuming a running one: %v", err)
	}
	mustPause(t, c, box.ID)
	if _, err := c.Control.SetTimeout(t.Context(), box.ID, time.Minute); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "is paused") {
		t.Errorf("the timeout of a paused one: %v", err)
	}
	if _, _, err := c.Control.Connect(t.Context(), box.ID, control.ConnectRequest{}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("no timeout: %v", err)
	}
	if _, _, err := c.Control.Connect(t.Context(), box.ID, control.ConnectRequest{Timeout: time.Minute, Cold: true}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("a cold boot of one whose memory was kept: %v", err)
	}
	c.Node.Room = 1
	mustCreate(t, c, minute())
	if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrExhausted) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("no room: %v", err)
	}
	c.Agents.Set("aaaaaa", nil)
	if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("its node is away: %v", err)
	}
}

// TestPauseWithoutMemory checks the files kind, which a cold connect may name.
func TestPauseWithoutMemory(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	req := minute()
	req.AutoPause, req.AutoPauseKind = true, sandbox.CheckpointFiles
	box := mustCreate(t, c, req)
	if !box.AutoPause || box.AutoPauseKind != sandbox.CheckpointFiles {
		t.Errorf("created %+v", box)
	}
	if box, err := c.Control.Pause(t.Context(), box.ID, sandbox.CheckpointFiles); err != nil || box.PausedKind != sandbox.CheckpointFiles {
		t.Errorf("%+v, %v", box, err)
	}
	never := false
	got, err := c.Control.Resume(t.Context(), box.ID, control.ConnectRequest{Timeout: control.Never, Cold: true, AutoPause: &never})
	if err != nil || got.AutoPause || !got.EndAt.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestConnectWaits checks that a pause and a resume that are under way are waited for.
func TestConnectWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		box := mustCreate(t, c, minute())
		release := c.Node.Hold()
		var g sync.WaitGroup
		g.Go(func() { mustPause(t, c, box.ID) })
		synctest.Wait()
		for range 10 {
			g.Go(func() {
				if got, _, err := c.Control.Connect(t.Context(), box.ID, hour()); err != nil || got.State != sandbox.StateRunning {
					t.Errorf("%s, %v", got.State, err)
				}
			})
		}
		synctest.Wait()
		if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StatePausing {
			t.Errorf("it is %s", got.State)
		}
		release()
		g.Wait()
		if n := c.Node.Resumes(); n != 1 {
			t.Errorf("%d resumes for ten connects", n)
		}
	})
}

// TestConnectGivesUp checks that waiting has an end.
func TestConnectGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		box := mustCreate(t, c, minute())
		release := c.Node.Hold()
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _, _ = c.Control.Pause(ctx, box.ID, "") }()
		synctest.Wait()
		if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrConflict) && !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("after its deadline: %v", err)
		}
		cancel()
		release()
		synctest.Wait()
	})
}

// TestKillPaused checks that a killed one is gone at once, and that late news does not bring it back.
func TestKillPaused(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	mustPause(t, c, box.ID)
	late := c.Node.Standing()
	if err := c.Control.Kill(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
	late[0].Sandbox.Generation += 5
	if err := c.ReportChanges(t, c.Node, late); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("after the late report: %v", err)
	}
	if list, _ := c.Control.List(t.Context(), control.ListQuery{}); len(list.Sandboxes) != 0 {
		t.Errorf("%d are listed", len(list.Sandboxes))
	}
	if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("connect: %v", err)
	}
}

// TestPauseReports checks that answers and reports may come in any order, and that the history tells of both.
func TestPauseReports(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	mustPause(t, c, box.ID)
	old := c.Node.Changes(0)
	if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); err != nil {
		t.Fatal(err)
	}
	for _, changes := range [][]*nodev1.Change{old, c.Node.Changes(0), old} {
		if err := c.ReportChanges(t, c.Node, changes); err != nil {
			t.Fatal(err)
		}
		if got, _ := c.Control.Get(t.Context(), box.ID); got.State != sandbox.StateRunning {
			t.Errorf("after a report it is %s", got.State)
		}
	}
	for _, kind := range []string{"paused", "resumed"} {
		events, err := c.Control.Events(t.Context(), control.EventQuery{SandboxID: box.ID, Type: kind})
		if err != nil || len(events) != 1 {
			t.Errorf("%d events %s, %v", len(events), kind, err)
		}
	}
}

// TestConnectWhenTheIndexIsLate checks that a sandbox that was paused by its timeout, of which no report has come, is
// resumed all the same.
func TestConnectWhenTheIndexIsLate(t *testing.T) {
	for _, way := range []string{"connect", "resume"} {
		t.Run(way, func(t *testing.T) {
			c := apitest.NewCluster(t, nil)
			box := mustCreate(t, c, minute())
			c.Node.PauseByItself(t, box.ID)
			var err error
			if way == "resume" {
				_, err = c.Control.Resume(t.Context(), box.ID, hour())
			} else {
				_, _, err = c.Control.Connect(t.Context(), box.ID, hour())
			}
			if err != nil || c.Node.Resumes() != 1 {
				t.Errorf("%d resumes, %v", c.Node.Resumes(), err)
			}
		})
	}
}

func TestPauseWithoutAnAnswer(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	c.Node.Fail(connect.NewError(connect.CodeUnavailable, errors.New("connection refused")))
	if _, err := c.Control.Pause(t.Context(), box.ID, ""); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	c.Node.Fail(nil)
	c.Node.Lose(box.ID)
	if _, err := c.Control.Pause(t.Context(), box.ID, ""); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("%v", err)
	}
}
