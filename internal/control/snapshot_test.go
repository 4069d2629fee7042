package control_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func mustSnapshot(t *testing.T, c *apitest.Cluster, id sandbox.ID, name string) control.Snapshot {
	t.Helper()
	s, err := c.Control.CreateSnapshot(t.Context(), id, control.SnapshotRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSnapshotWithoutName(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	req := minute()
	req.Env, req.Secure, req.Resources = map[string]string{"A": "b"}, true, sandbox.Resources{MemoryBytes: 1 << 30}
	box := mustCreate(t, c, req)
	s := mustSnapshot(t, c, box.ID, "")
	if s.ID() != string(s.Template.ID)+":default" || len(s.Names()) != 0 || s.Template.Kind != sandbox.TemplateSnapshot {
		t.Errorf("%s, names %v, %+v", s.ID(), s.Names(), s.Template)
	}
	made := mustCreate(t, c, control.CreateRequest{Template: s.ID(), Timeout: time.Minute})
	if made.Resources != box.Resources || !made.Secure || made.TemplateID != s.Template.ID {
		t.Errorf("made from it: %+v", made)
	}
	sent := c.Node.Created()[1]
	if sent.GetCheckpointId() != s.Build.ID || sent.GetGuest().GetEnv()["A"] != "b" || sent.GetImageDigest() != apitest.BaseDigest {
		t.Errorf("asked for %v", sent)
	}
	_, err := c.Control.Create(t.Context(), control.CreateRequest{
		Template: s.ID(), Timeout: time.Minute, Resources: sandbox.Resources{MemoryBytes: 2 << 30},
	})
	if !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("another size: %v", err)
	}
	mustPause(t, c, box.ID)
	if s := mustSnapshot(t, c, box.ID, ""); s.Build.Source != string(box.ID) {
		t.Errorf("of a paused one: %+v", s)
	}
}

func TestSnapshotNames(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	one, two := mustCreate(t, c, minute()), mustCreate(t, c, minute())
	first := mustSnapshot(t, c, one.ID, "Team/Snap")
	if diff := cmp.Diff([]string{"team/snap:default"}, first.Names()); diff != "" || first.ID() != "team/snap:default" {
		t.Errorf("%s, %s", first.ID(), diff)
	}
	second := mustSnapshot(t, c, two.ID, "team/snap")
	if second.Template.ID != first.Template.ID || second.ID() != first.ID() || second.Template.SourceSandbox != two.ID {
		t.Errorf("the second is %+v", second)
	}
	if diff := cmp.Diff([]string{second.Build.ID}, c.Node.Checkpoints()); diff != "" {
		t.Errorf("the build that no tag means was kept: %s", diff)
	}
	tagged := mustSnapshot(t, c, one.ID, "team/snap:v2")
	if tagged.Template.ID != first.Template.ID || tagged.ID() != "team/snap:v2" || len(c.Node.Checkpoints()) != 2 {
		t.Errorf("the tagged is %+v, checkpoints %v", tagged, c.Node.Checkpoints())
	}
	if mustCreate(t, c, control.CreateRequest{Template: "team/snap", Timeout: time.Minute}); c.Node.Created()[2].GetCheckpointId() != second.Build.ID {
		t.Error("the name does not mean the newest")
	}
}

func TestSnapshotRefusals(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	tests := []struct {
		name string
		id   sandbox.ID
		req  control.SnapshotRequest
		want error
	}{
		{"of a template", box.ID, control.SnapshotRequest{Name: "base:v1"}, sandbox.ErrConflict},
		{"a name that can be none", box.ID, control.SnapshotRequest{Name: "a b"}, sandbox.ErrInvalid},
		{"an unknown kind", box.ID, control.SnapshotRequest{Kind: "disk"}, sandbox.ErrInvalid},
		{"an unknown sandbox", "nobody", control.SnapshotRequest{}, sandbox.ErrNotFound},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := c.Control.CreateSnapshot(t.Context(), tt.id, tt.req); !errors.Is(err, tt.want) {
				t.Errorf("%v", err)
			}
		})
	}
	if left := c.Node.Checkpoints(); len(left) > 0 {
		t.Errorf("checkpoints %v were made", left)
	}
}

// noTemplates is a store that takes no new template.
type noTemplates struct{ *apitest.Records }

func (noTemplates) CreateTemplate(context.Context, sandbox.Template) error {
	return sandbox.Unavailablef("the store is away")
}

// TestSnapshotWithoutRecord checks that nothing stays at the node of a snapshot that no record is of.
func TestSnapshotWithoutRecord(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	c.Restart(t, func(cfg *control.Config) { cfg.Templates = noTemplates{c.Records} })
	c.Join(t, c.Node)
	box := mustCreate(t, c, minute())
	if _, err := c.Control.CreateSnapshot(t.Context(), box.ID, control.SnapshotRequest{}); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	if left := c.Node.Checkpoints(); len(left) > 0 {
		t.Errorf("checkpoints %v were left", left)
	}
}

func TestListSnapshots(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	one, two := mustCreate(t, c, minute()), mustCreate(t, c, minute())
	want := []string{
		mustSnapshot(t, c, one.ID, "snap").ID(), mustSnapshot(t, c, one.ID, "snap:v2").ID(), mustSnapshot(t, c, two.ID, "other").ID(),
		mustSnapshot(t, c, two.ID, "").ID(),
	}
	tests := []struct {
		name  string
		query control.SnapshotQuery
		want  []string
	}{
		{"all", control.SnapshotQuery{}, []string{want[3], want[2], want[1], want[0]}},
		{"of a sandbox", control.SnapshotQuery{SandboxID: one.ID}, []string{want[1], want[0]}},
		{"by name", control.SnapshotQuery{Name: "snap"}, []string{want[1], want[0]}},
		{"by name and tag", control.SnapshotQuery{Name: "snap:v2"}, []string{want[1]}},
		{"by default tag", control.SnapshotQuery{Name: "snap:default"}, []string{want[0]}},
		{"by id", control.SnapshotQuery{Name: want[3]}, []string{want[3]}},
		{"of nobody", control.SnapshotQuery{SandboxID: "nobody"}, nil},
		{"of a template", control.SnapshotQuery{Name: "base"}, nil},
		{"by two", control.SnapshotQuery{SandboxID: two.ID, Name: "snap"}, nil},
	}
	for _, tt := range tests {
		for _, limit := range []int{1, 3, 100} {
			t.Run(tt.name, func(t *testing.T) {
				q := tt.query
				q.Limit = limit
				var got []string
				for {
					page, next, err := c.Control.ListSnapshots(t.Context(), q)
					if err != nil || len(page) > limit {
						t.Fatalf("%d, %v", len(page), err)
					}
					for _, s := range page {
						got = append(got, s.ID())
					}
					if q.Next = next; next == "" {
						break
					}
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
	for _, q := range []control.SnapshotQuery{{Limit: -1}, {Next: "nope"}, {Name: "a b"}} {
		if _, _, err := c.Control.ListSnapshots(t.Context(), q); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

func TestDeleteSnapshot(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	mustSnapshot(t, c, box.ID, "snap")
	kept := mustSnapshot(t, c, box.ID, "snap:v2")
	unnamed := mustSnapshot(t, c, box.ID, "")
	for _, ref := range []string{"snap:default", unnamed.ID()} {
		if err := c.Control.DeleteSnapshot(t.Context(), ref); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		if err := c.Control.DeleteSnapshot(t.Context(), ref); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%s again: %v", ref, err)
		}
	}
	if diff := cmp.Diff([]string{kept.Build.ID}, c.Node.Checkpoints()); diff != "" {
		t.Errorf("left: %s", diff)
	}
	if err := c.Control.DeleteSnapshot(t.Context(), "snap:v2"); err != nil || len(c.Node.Checkpoints()) != 0 {
		t.Errorf("%v, left %v", err, c.Node.Checkpoints())
	}
	for _, ref := range []string{"base", "snap", "a b"} {
		if err := c.Control.DeleteSnapshot(t.Context(), ref); err == nil || strings.Contains(ref, "base") && !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

func TestRollback(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box, other := mustCreate(t, c, minute()), mustCreate(t, c, minute())
	own, foreign := mustSnapshot(t, c, box.ID, "own"), mustSnapshot(t, c, other.ID, "foreign")
	got, err := c.Control.Rollback(t.Context(), box.ID, own.ID())
	if err != nil || got.ID != box.ID || got.State != sandbox.StateRunning || got.Generation <= box.Generation {
		t.Errorf("%+v, %v", got, err)
	}
	for ref, want := range map[string]error{
		foreign.ID(): sandbox.ErrConflict, "base": sandbox.ErrConflict, "nope": sandbox.ErrNotFound, "": sandbox.ErrInvalid,
	} {
		if _, err := c.Control.Rollback(t.Context(), box.ID, ref); !errors.Is(err, want) {
			t.Errorf("to %q: %v", ref, err)
		}
	}
}

// TestSnapshotIsWhereItIs checks that a node that has not what it would start from is only asked when the one that has is full.
func TestSnapshotIsWhereItIs(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	box := mustCreate(t, c, minute())
	s := mustSnapshot(t, c, box.ID, "")
	second := apitest.NewNode("bbbbbb")
	c.Join(t, second)
	for range 20 {
		mustCreate(t, c, control.CreateRequest{Template: s.ID(), Timeout: time.Minute})
	}
	c.Node.Room = 1
	if n := len(second.Created()); n > 0 {
		t.Errorf("the other node was asked %d times", n)
	}
	box, err := c.Control.Create(t.Context(), control.CreateRequest{Template: s.ID(), Timeout: time.Minute})
	if err != nil || box.NodeID != "bbbbbb" {
		t.Fatalf("its node is full: %s, %v", box.NodeID, err)
	}
	if peers := second.Created()[0].GetPeers(); len(peers) != 1 || peers[0].GetNodeId() != "aaaaaa" {
		t.Errorf("it could get it from %v", peers)
	}
}
