package store

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestPlacement(t *testing.T) {
	s := fresh(t)
	const id = sandbox.ID("iaaaaaa1")
	if _, err := s.Placement(t.Context(), id); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
	first := sandbox.Placement{ID: id, Node: "bbbbbb", Generation: 5, Stale: []sandbox.NodeID{"aaaaaa"}}
	if err := s.CommitPlacement(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	for _, generation := range []int64{4, 5} {
		if err := s.CommitPlacement(t.Context(), sandbox.Placement{ID: id, Node: "cccccc", Generation: generation}); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("generation %d: %v", generation, err)
		}
	}
	if err := s.CommitPlacement(t.Context(), sandbox.Placement{ID: id, Node: "aaaaaa", Generation: 6}); err != nil {
		t.Fatal(err)
	}
	p, err := s.Placement(t.Context(), id)
	if err != nil || p.Node != "aaaaaa" || !slices.Equal(p.Stale, []sandbox.NodeID{"bbbbbb"}) {
		t.Errorf("what had it before: %+v, %v", p, err)
	}
	if err := s.ChangePlacement(t.Context(), id, func(p *sandbox.Placement) bool { p.DropStale("bbbbbb"); return true }); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Placements(t.Context()); err != nil || len(all) != 1 || len(all[0].Stale) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := s.ChangePlacement(t.Context(), id, func(*sandbox.Placement) bool { return false }); err != nil {
		t.Fatal(err)
	}
	if err := s.ChangePlacement(t.Context(), id, func(*sandbox.Placement) bool { return false }); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

// TestPlacementIsDecidedOnce has several writers commit the same generation: one of them does.
func TestPlacementIsDecidedOnce(t *testing.T) {
	s := fresh(t)
	var wg sync.WaitGroup
	won := make(chan sandbox.NodeID, 8)
	for i := range 8 {
		wg.Go(func() {
			node := sandbox.NodeID(rune('a' + i))
			err := s.CommitPlacement(t.Context(), sandbox.Placement{ID: "one", Node: node, Generation: 3})
			if err == nil {
				won <- node
			} else if !errors.Is(err, sandbox.ErrConflict) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if p, err := s.Placement(t.Context(), "one"); err != nil || len(won) != 1 || p.Node != <-won {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestReplica(t *testing.T) {
	s := fresh(t)
	r := sandbox.Replica{ID: "one", Home: "aaaaaa", Generation: 4, Checkpoint: "p1", Holders: []sandbox.NodeID{"bbbbbb"}}
	if err := s.CreateReplica(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateReplica(t.Context(), r); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
	next := r
	next.Home, next.Generation, next.Holders, next.Returning = "bbbbbb", 5, nil, true
	p := sandbox.Placement{ID: "one", Node: "bbbbbb", Generation: 5}
	if err := s.MoveReplica(t.Context(), r, next, p); err != nil {
		t.Fatal(err)
	}
	// Whoever knows the record as it was decides nothing any more: neither part is written.
	if err := s.MoveReplica(t.Context(), r, next, sandbox.Placement{ID: "one", Node: "cccccc", Generation: 9}); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
	if err := s.MoveReplica(t.Context(), next, r, sandbox.Placement{ID: "one", Node: "cccccc", Generation: 5}); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
	for what, do := range map[string]func(context.Context) error{
		"remove": func(ctx context.Context) error { return s.RemoveReplica(ctx, r) },
		"update": func(ctx context.Context) error { return s.UpdateReplica(ctx, r, next) },
	} {
		if err := do(t.Context()); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if at, err := s.Placement(t.Context(), "one"); err != nil || at.Node != "bbbbbb" {
		t.Errorf("%+v, %v", at, err)
	}
	if all, err := s.Replicas(t.Context()); err != nil || len(all) != 1 || !all[0].Same(next) {
		t.Errorf("%+v, %v", all, err)
	}
	if err := s.RemoveReplica(t.Context(), next); err != nil {
		t.Error(err)
	}
	if err := s.RemoveReplica(t.Context(), next); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}

func TestKillIntents(t *testing.T) {
	s := fresh(t)
	k := sandbox.KillIntent{ID: "one", Node: "aaaaaa"}
	if err := errors.Join(s.PutKillIntent(t.Context(), k), s.PutKillIntent(t.Context(), k)); err != nil {
		t.Fatal(err)
	}
	if all, err := s.KillIntents(t.Context()); err != nil || !slices.Equal(all, []sandbox.KillIntent{k}) {
		t.Errorf("%+v, %v", all, err)
	}
	if err := errors.Join(s.DeleteKillIntent(t.Context(), "one"), s.DeleteKillIntent(t.Context(), "one")); err != nil {
		t.Error(err)
	}
}

func TestStored(t *testing.T) {
	s := fresh(t)
	one := sandbox.Stored{Checkpoint: "pause-one-3", At: time.Unix(1000, 0).UTC()}
	if err := errors.Join(s.PutStored(t.Context(), one), s.PutStored(t.Context(), one)); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Stored(t.Context()); err != nil || !slices.Equal(all, []sandbox.Stored{one}) {
		t.Errorf("%+v, %v", all, err)
	}
	if err := s.PutStored(t.Context(), sandbox.Stored{}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
	if err := errors.Join(s.DeleteStored(t.Context(), one.Checkpoint), s.DeleteStored(t.Context(), one.Checkpoint)); err != nil {
		t.Error(err)
	}
	if all, err := s.Stored(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestPins(t *testing.T) {
	s := fresh(t)
	p := sandbox.Pin{Key: "k", Request: "r", Node: "aaaaaa"}
	if kept, was, err := s.Pin(t.Context(), p, time.Hour); err != nil || was || kept != p {
		t.Errorf("%+v, %t, %v", kept, was, err)
	}
	other := sandbox.Pin{Key: "k", Request: "s", Node: "bbbbbb"}
	if kept, was, err := s.Pin(t.Context(), other, time.Hour); err != nil || !was || kept != p {
		t.Errorf("%+v, %t, %v", kept, was, err)
	}
	if err := s.MovePin(t.Context(), other, "cccccc"); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
	if err := s.MovePin(t.Context(), p, "cccccc"); err != nil {
		t.Fatal(err)
	}
	// It still ends: moving it kept its lease.
	resp, err := s.client.Get(t.Context(), s.pins().key("k"))
	if err != nil || len(resp.Kvs) != 1 || resp.Kvs[0].GetLease() == 0 {
		t.Errorf("%v, %v", resp, err)
	}
	if kept, was, err := s.Pin(t.Context(), p, time.Hour); err != nil || !was || kept.Node != "cccccc" {
		t.Errorf("%+v, %t, %v", kept, was, err)
	}
	if err := errors.Join(s.Unpin(t.Context(), "k"), s.Unpin(t.Context(), "k")); err != nil {
		t.Error(err)
	}
}

func TestNodeSettingsAreDeleted(t *testing.T) {
	s := fresh(t)
	drain := &sandbox.NodeDrain{StartedAt: time.Now().UTC(), MaxParallel: 2}
	if _, err := s.UpdateNodeSettings(t.Context(), "aaaaaa", func(n *sandbox.NodeSettings) error { n.Drain = drain; return nil }); err != nil {
		t.Fatal(err)
	}
	if all, err := s.NodeSettings(t.Context()); err != nil || all["aaaaaa"].Drain == nil || !all["aaaaaa"].Drain.Active() {
		t.Errorf("%+v, %v", all, err)
	}
	if err := errors.Join(s.DeleteNodeSettings(t.Context(), "aaaaaa"), s.DeleteNodeSettings(t.Context(), "aaaaaa")); err != nil {
		t.Error(err)
	}
}
