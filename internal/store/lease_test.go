package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// attend keeps p there until the returned function is called.
func attend(t *testing.T, s *Store, p Presence, ttl time.Duration) (leave func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Attend(ctx, p, ttl) }()
	left := false
	leave = func() {
		if left {
			return
		}
		left = true
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Attend: %v", err)
		}
	}
	t.Cleanup(leave)
	return leave
}

func there(t *testing.T, s *Store) []Presence {
	t.Helper()
	all, err := s.Presences(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestAttend(t *testing.T) {
	s := fresh(t)
	p := Presence{Role: sandbox.RoleProxy, ID: "aaaaaa", Name: "edge", Address: "10.0.0.1:80", Version: "v1", Since: start}
	leave := attend(t, s, p, time.Minute)
	eventually(t, "the presence is there", func() bool { return len(there(t, s)) == 1 })
	if diff := cmp.Diff([]Presence{p}, there(t, s)); diff != "" {
		t.Error(diff)
	}
	leave()
	if all := there(t, s); len(all) != 1 {
		t.Errorf("%+v within the life of its lease", all)
	}
	m := sandbox.Member{Role: p.Role, ID: p.ID}
	for range 2 {
		if err := s.RemovePresence(t.Context(), m); err != nil {
			t.Error(err)
		}
	}
	if all := there(t, s); len(all) != 0 {
		t.Errorf("%+v after it was removed", all)
	}
}

// Whoever stops attending leaves a record that ends by itself.
func TestPresenceEndsAfterwards(t *testing.T) {
	s := fresh(t)
	leave := attend(t, s, Presence{Role: sandbox.RoleProxy, ID: "aaaaaa"}, LeastTTL)
	eventually(t, "the presence is there", func() bool { return len(there(t, s)) == 1 })
	leave()
	eventually(t, "the record is gone", func() bool { return len(there(t, s)) == 0 })
}

// The lease ends although its owner lives, as after a long stop of the machine: the record comes back.
func TestAttendAgain(t *testing.T) {
	s := fresh(t)
	attend(t, s, Presence{Role: sandbox.RoleProxy, ID: "aaaaaa"}, LeastTTL)
	eventually(t, "the presence is there", func() bool { return len(there(t, s)) == 1 })
	first := leaseOf(t, s)
	if _, err := s.client.Revoke(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the presence is there again", func() bool { next := leaseOf(t, s); return next != 0 && next != first })
}

func leaseOf(t *testing.T, s *Store) clientv3.LeaseID {
	t.Helper()
	resp, err := s.client.Get(t.Context(), s.presences().key("proxy/aaaaaa"))
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return 0
	}
	return clientv3.LeaseID(resp.Kvs[0].GetLease())
}

// The later of two that attend as one has the record: the end of the earlier one does not take it away.
func TestAttendTakesOver(t *testing.T) {
	s := fresh(t)
	p := Presence{Role: sandbox.RoleProxy, ID: "aaaaaa", Name: "before"}
	leave := attend(t, s, p, time.Minute)
	eventually(t, "the first is there", func() bool { return len(there(t, s)) == 1 })
	p.Name = "after"
	attend(t, s, p, time.Minute)
	eventually(t, "the second is there", func() bool { return there(t, s)[0].Name == "after" })
	leave()
	if all := there(t, s); len(all) != 1 || all[0].Name != "after" {
		t.Errorf("%+v", all)
	}
}

// A process that died takes its record along after the lease's time.
func TestPresenceExpires(t *testing.T) {
	s := fresh(t)
	one := tenant[Presence]{all: s.presences(), name: "proxy/aaaaaa", ttl: LeastTTL, log: s.log}
	if _, err := one.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(there(t, s)) != 1 {
		t.Error("the record is not there")
	}
	eventually(t, "the record is gone", func() bool { return len(there(t, s)) == 0 })
}

func TestAttendRefusals(t *testing.T) {
	s := fresh(t)
	for name, p := range map[string]Presence{"no role": {ID: "aaaaaa"}, "no id": {Role: sandbox.RoleProxy}} {
		if err := s.Attend(t.Context(), p, time.Minute); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Attend(t.Context(), Presence{Role: sandbox.RoleProxy, ID: "aaaaaa"}, time.Millisecond); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a short life: %v", err)
	}
}

func campaign(t *testing.T, s *Store, who string, ttl time.Duration) *Term {
	t.Helper()
	term, err := s.Campaign(t.Context(), "lifecycle", who, ttl)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if term.Leading() {
			if err := term.Resign(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	return term
}

func TestCampaign(t *testing.T) {
	s := fresh(t)
	if _, err := s.Leader(t.Context(), "lifecycle"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("before any: %v", err)
	}
	first := campaign(t, s, "one", time.Minute)
	ctx, cancel := first.Context(t.Context())
	defer cancel()
	node := sandbox.Node{ID: "aaaaaa", Name: "written"}
	if err := s.PutNode(ctx, node); err != nil || !first.Leading() {
		t.Errorf("a write of the leader: %v", err)
	}
	next := make(chan *Term)
	go func() {
		term, err := s.Campaign(t.Context(), "lifecycle", "two", time.Minute)
		if err != nil {
			t.Error(err)
		}
		next <- term
	}()
	if who, err := s.Leader(t.Context(), "lifecycle"); err != nil || who != "one" {
		t.Errorf("leader %q, %v", who, err)
	}
	if err := first.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := <-next
	defer func() {
		if err := second.Resign(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	if first.Leading() || ctx.Err() == nil || !second.Leading() {
		t.Error("the first still leads, or the second does not")
	}
	if who, err := s.Leader(t.Context(), "lifecycle"); err != nil || who != "two" {
		t.Errorf("leader %q, %v", who, err)
	}
}

// A leader that does not know yet that its term is over writes nothing any more.
func TestTermGuardsWrites(t *testing.T) {
	s := fresh(t)
	node := sandbox.Node{ID: "aaaaaa", Name: "one"}
	if err := s.PutNode(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	term := campaign(t, s, "one", time.Minute)
	ctx := context.WithValue(t.Context(), termKey{}, term) // does not end with the term
	update := func() error {
		_, err := s.UpdateNode(ctx, "aaaaaa", func(n *sandbox.Node) error { n.Name = "two"; return nil })
		return err
	}
	if err := s.CreateToken(ctx, Token{ID: "t1", Hash: "h", Role: sandbox.RoleNode, ExpiresAt: start}); err != nil {
		t.Error(err)
	}
	// A condition of the write itself that fails is not mistaken for the end of the term.
	if err := s.CreateToken(ctx, Token{ID: "t1", Hash: "h", Role: sandbox.RoleNode, ExpiresAt: start}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("an id twice: %v", err)
	}
	if _, err := s.client.Delete(t.Context(), term.election.Key()); err != nil {
		t.Fatal(err)
	}
	for name, write := range map[string]func() error{
		"put": func() error { return s.PutNode(ctx, node) }, "update": update,
		"create": func() error {
			return s.CreateToken(ctx, Token{ID: "t2", Hash: "h", Role: sandbox.RoleNode, ExpiresAt: start})
		},
		"remove": func() error { return s.DeleteNode(ctx, "aaaaaa") },
	} {
		if err := write(); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("%s after the term: %v, want ErrUnavailable", name, err)
		}
	}
	if got, err := s.Node(t.Context(), "aaaaaa"); err != nil || got.Name != "one" {
		t.Errorf("%+v, %v", got, err)
	}
}

// The lease of a leader ends: it learns of that, and the next one leads.
func TestTermEndsWithItsLease(t *testing.T) {
	s := fresh(t)
	first := campaign(t, s, "one", LeastTTL)
	ctx, cancel := first.Context(t.Context())
	defer cancel()
	if _, err := s.client.Revoke(t.Context(), first.session.Lease()); err != nil {
		t.Fatal(err)
	}
	campaign(t, s, "two", time.Minute)
	<-first.Done()
	<-ctx.Done()
}

func TestCampaignIsGivenUp(t *testing.T) {
	s := fresh(t)
	campaign(t, s, "one", time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := s.Campaign(ctx, "lifecycle", "two", time.Minute)
		done <- err
	}()
	candidates := func() int {
		resp, err := s.client.Get(t.Context(), root+"elections/lifecycle/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			t.Fatal(err)
		}
		return int(resp.Count)
	}
	eventually(t, "two candidates", func() bool { return candidates() == 2 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if n := candidates(); n != 1 {
		t.Errorf("%d candidates are left", n)
	}
	for name, ttl := range map[string]time.Duration{"lifecycle": 0, "": time.Minute} {
		if _, err := s.Campaign(t.Context(), name, "x", ttl); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("office %q for %s: %v", name, ttl, err)
		}
	}
}
