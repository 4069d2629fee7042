package daemon

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/store"
)

// candidate is a server that stands for election.
type candidate struct {
	*apitest.Cluster
	leader *leader
	stop   func()
}

func newCandidate(t *testing.T, st *store.Store) *candidate {
	t.Helper()
	quiet, c := slog.New(slog.DiscardHandler), apitest.NewCluster(t, nil)
	l := newLeader(config.Default(), st, c.Control, quiet, prometheus.NewRegistry())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.run(ctx) }()
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return &candidate{Cluster: c, leader: l, stop: stop}
}

func (c *candidate) leads() bool { return testutil.ToFloat64(c.leader.leading) == 1 }

// TestChangeOfLeader has one server follow another as the one that sees to ends: at every moment at most one decides, each
// end is carried out once, and none early.
func TestChangeOfLeader(t *testing.T) {
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	}()
	first := newCandidate(t, st)
	first.until(t, "the first leads", first.leads)
	second := newCandidate(t, st)
	second.Join(t, first.Node) // one node, two servers
	ends := make(map[string]time.Time)
	for i := range 20 {
		maker := first
		if i%2 == 0 {
			maker = second
		}
		b, err := maker.Control.Create(t.Context(), control.CreateRequest{Timeout: time.Second + time.Duration(i)*50*time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		ends[string(b.ID)] = b.EndAt
	}
	ended := func(n int) func() bool {
		return func() bool {
			if first.leads() && second.leads() {
				t.Error("both lead")
			}
			for _, c := range []*candidate{first, second} {
				if err := c.Report(t, first.Node, false); err != nil {
					t.Fatal(err)
				}
			}
			return countEnds(t, first, ends) >= n
		}
	}
	first.until(t, "some have ended", ended(5))
	first.stop()
	second.until(t, "the second leads", second.leads)
	second.until(t, "all have ended", ended(len(ends)))
	second.stop()
	if a, b := first.leader.loop.Stats().Killed.Load(), second.leader.loop.Stats().Killed.Load(); a < 1 || b < 1 || a+b != int64(len(ends)) {
		t.Errorf("the first ended %d, the second %d, of %d", a, b, len(ends))
	}
}

// until waits for something that happens by itself.
func (c *candidate) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); <-time.After(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// countEnds returns how many sandboxes have ended, and checks that none did early or twice.
func countEnds(t *testing.T, c *candidate, ends map[string]time.Time) int {
	t.Helper()
	seen := make(map[string]bool)
	for _, change := range c.Node.Changes(0) {
		id := change.GetSandbox().GetId()
		if change.GetType() != "timed_out" {
			continue
		}
		if at := change.GetTime().AsTime(); seen[id] || at.Before(ends[id]) {
			t.Errorf("%s: ended twice %t, or %s early", id, seen[id], ends[id].Sub(at))
		}
		seen[id] = true
	}
	return len(seen)
}
