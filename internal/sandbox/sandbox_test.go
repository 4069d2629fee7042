package sandbox_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestIDsCarryTheirNode(t *testing.T) {
	seen := map[sandbox.ID]bool{}
	for range 100 {
		node := sandbox.NewNodeID()
		id := sandbox.NewID(node)
		if id.Node() != node || len(id) != 20 || seen[id] {
			t.Fatalf("id %q of node %q: node %q, seen %t", id, node, id.Node(), seen[id])
		}
		if _, err := sandbox.ParseID(string(id)); err != nil {
			t.Fatal(err)
		}
		seen[id] = true
	}
	if got := sandbox.ID("foreign").Node(); got != "" {
		t.Errorf("node of a foreign id: %q", got)
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", "abc", "i-1", "ABC", "a b", "ä", strings.Repeat("a", 65), "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := sandbox.ParseID(s)
		plain := len(s) >= 1 && len(s) <= 64
		for i := range len(s) {
			plain = plain && (s[i] >= 'a' && s[i] <= 'z' || s[i] >= '0' && s[i] <= '9')
		}
		if plain != (err == nil) || (err != nil && !errors.Is(err, sandbox.ErrInvalid)) {
			t.Fatalf("ParseID(%q) = %q, %v", s, id, err)
		}
	})
}

func TestAccessTokensDiffer(t *testing.T) {
	a, b := sandbox.AccessToken([]byte("secret"), "one"), sandbox.AccessToken([]byte("secret"), "two")
	if a == b || len(a) != 64 || a != sandbox.AccessToken([]byte("secret"), "one") || a == sandbox.AccessToken([]byte("other"), "one") {
		t.Errorf("tokens %q and %q", a, b)
	}
}

// TestStates checks that every state can be left for an end, and that ends are ends.
func TestStates(t *testing.T) {
	all := []sandbox.State{
		sandbox.StateCreating, sandbox.StateRunning, sandbox.StatePausing, sandbox.StatePaused, sandbox.StateResuming, sandbox.StateStopping,
		sandbox.StateStopped, sandbox.StateMigrating, sandbox.StateLost, sandbox.StateFailed, sandbox.StateDeleted,
	}
	for _, s := range all {
		if !s.Valid() {
			t.Errorf("%s is no state", s)
		}
		if s != sandbox.StateDeleted && !s.CanBecome(sandbox.StateDeleted) {
			t.Errorf("%s cannot be deleted", s)
		}
		if sandbox.StateDeleted.CanBecome(s) {
			t.Errorf("deleted can become %s", s)
		}
	}
	if sandbox.State("odd").Valid() || sandbox.StateFailed.CanBecome(sandbox.StateRunning) {
		t.Error("the table allows what it must not")
	}
}

func TestKinds(t *testing.T) {
	err := sandbox.NotFoundf("sandbox %s", "x")
	if !errors.Is(err, sandbox.ErrNotFound) || err.Error() != "sandbox x" || errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("NotFoundf: %v", err)
	}
}
