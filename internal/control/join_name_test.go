package control_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestRemoveNodeThatNeverRan frees the name of a machine that joined and is not seen again.
func TestRemoveNodeThatNeverRan(t *testing.T) {
	c, zero := newClub(t), 0
	token := c.token(t, control.TokenRequest{Uses: &zero})
	if err := c.join(t, newNewcomer(t, "bbbbbb", "second"), token); err != nil {
		t.Fatal(err)
	}
	err := c.join(t, newNewcomer(t, "cccccc", "second"), token)
	if !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "cloister node rm bbbbbb") {
		t.Errorf("its name: %v; want to be told how it is made free", err)
	}
	if err := c.Control.RemoveNode(t.Context(), "second", false); err != nil {
		t.Fatal(err)
	}
	if err := c.Control.RemoveNode(t.Context(), "second", false); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if err := c.join(t, newNewcomer(t, "cccccc", "second"), token); err != nil {
		t.Error(err)
	}
}

// TestNamesAreForMembers tells nobody without a good token which nodes there are.
func TestNamesAreForMembers(t *testing.T) {
	c := newClub(t)
	req, _ := newNewcomer(t, "bbbbbb", "node-aaaaaa").request(t, c.token(t, control.TokenRequest{Role: sandbox.RoleProxy}))
	if _, err := c.Control.Join(t.Context(), req); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("%v; want ErrDenied", err)
	}
}
