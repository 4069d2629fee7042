package control_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestKilledAfterItFailed kills a sandbox while its node is away, where it has ended by itself: it is gone, also for the next server.
func TestKilledAfterItFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lossy(t)
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Hour})
		silent(t, c, c.Node, 17*time.Second)
		c.Node.Crash(box.ID, "out of memory")
		if err := c.Control.Kill(t.Context(), box.ID); err != nil {
			t.Fatal(err)
		}
		c.Restart(t, impatient)
		running(t, c)
		c.Join(t, c.Node)
		passWith(t, c, 5*time.Second, c.Node)
		if got, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("it is %s, %v", got.State, err)
		}
	})
}

// TestKilledOnItsCutOffNode kills a guarded sandbox on its node while no server reaches that, and another brings it back: it ends
// there too, once the node tells of it.
func TestKilledOnItsCutOffNode(t *testing.T) {
	for _, name := range []string{"in time", "brought back", "brought back and resumed", "another server"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, others, box := guarded(t)
				b, d := others[0], others[1]
				away := 40 * time.Second
				if name == "in time" {
					away = 5 * time.Second
				}
				silent(t, c, c.Node, away, b, d)
				if name == "brought back and resumed" {
					if _, _, err := c.Control.Connect(t.Context(), box.ID, hour()); err != nil {
						t.Fatal(err)
					}
				}
				if name == "another server" {
					c.Restart(t, impatient)
					running(t, c)
					c.Join(t, b)
					c.Join(t, d)
				}
				if _, err := c.Node.Kill(t.Context(), &agentv1.KillRequest{Id: string(box.ID)}); err != nil {
					t.Fatal(err)
				}
				c.Join(t, c.Node)
				if err := c.Report(t, c.Node, false); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Control.Get(t.Context(), box.ID); !errors.Is(err, sandbox.ErrNotFound) {
					t.Errorf("once its node has told: %v", err)
				}
				passWith(t, c, 15*time.Second, c.Node, b, d)
				for _, n := range []*apitest.Node{c.Node, b, d} {
					if has := n.Has(box.ID); has != agentv1.State_STATE_UNSPECIFIED {
						t.Errorf("node %s has it as %s", n.ID, has)
					}
				}
				if left := records(t, c); len(left) > 0 {
					t.Errorf("records %+v", left)
				}
				if left, err := c.Decided.Placements(t.Context()); err != nil || len(left) > 0 {
					t.Errorf("placements %+v, %v", left, err)
				}
				if left, err := c.Decided.KillIntents(t.Context()); err != nil || len(left) > 0 {
					t.Errorf("to be killed %+v, %v", left, err)
				}
				if told, err := c.Control.Events(t.Context(), control.EventQuery{SandboxID: box.ID, Type: "kill_wanted"}); err != nil ||
					name != "in time" && len(told) != 1 {
					t.Errorf("events %+v, %v", told, err)
				}
			})
		})
	}
}
