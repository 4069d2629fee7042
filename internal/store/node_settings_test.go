package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestNodeSettings(t *testing.T) {
	s := fresh(t)
	if all, err := s.NodeSettings(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	// Writers at once lose nothing.
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			_, err := s.UpdateNodeSettings(t.Context(), "aaaaaa", func(n *sandbox.NodeSettings) error {
				if n.Labels == nil {
					n.Labels = map[string]string{}
				}
				n.Labels[fmt.Sprint("k", i)] = "v"
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	refused := errors.New("no")
	if _, err := s.UpdateNodeSettings(t.Context(), "aaaaaa", func(n *sandbox.NodeSettings) error {
		n.AddTaint(sandbox.Taint{Key: "a", Effect: sandbox.NoSchedule})
		return refused
	}); !errors.Is(err, refused) {
		t.Error(err)
	}
	// The node's own record is another.
	if err := s.PutNode(t.Context(), sandbox.Node{ID: "aaaaaa", Labels: map[string]string{"own": "1"}}); err != nil {
		t.Fatal(err)
	}
	all, err := s.NodeSettings(t.Context())
	if err != nil || len(all["aaaaaa"].Labels) != 8 || len(all["aaaaaa"].Taints) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestSchedulerPolicy(t *testing.T) {
	s := fresh(t)
	if _, err := s.SchedulerPolicy(t.Context()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
	for _, text := range []string{`{"strategy":"binpack"}`, `{"sample":4}`} {
		if err := s.PutSchedulerPolicy(t.Context(), json.RawMessage(text)); err != nil {
			t.Fatal(err)
		}
		got, err := s.SchedulerPolicy(t.Context())
		if diff := cmp.Diff(text, string(got)); err != nil || diff != "" {
			t.Error(err, diff)
		}
	}
	for range 2 {
		if err := s.PutSchedulerPolicy(t.Context(), nil); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.SchedulerPolicy(t.Context()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Error(err)
	}
}
